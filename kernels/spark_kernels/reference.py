"""The definition of every operation in plain PyTorch: readable, slow, on any device.

Kernels are tested against these functions: records byte for byte, attention within rounding. To make the former
possible, whatever decides the bytes of a record is computed here in float32, one correctly rounded operation at a
time and in a stated order.

Non-finite numbers: a finite key gives a finite record. A key with a NaN or an infinity gives the record of a zero key
with NaN for its scales, so that attention over it is NaN as it would be over the key itself. Values keep their NaN; an
int4 value with a NaN is NaN in all channels that share its scale.
"""

from __future__ import annotations

import itertools
import math

import torch

from spark_kernels.record import (
    INT4_GROUPS,
    INT4_LIMIT,
    CompressedKeyFormat,
    Int4ValueFormat,
    LayerRows,
    RawKeyFormat,
    ValueFormat,
)

FLOAT32_MAX = torch.finfo(torch.float32).max
FLOAT16_MAX = torch.finfo(torch.float16).max


def query_norms(
    q: torch.Tensor, num_kv_heads: int, *, qo_indptr: torch.Tensor | None = None, window: int = 32
) -> torch.Tensor:
    """Norm of each query channel over the observation window of each token.

    The window of a token is the last ``window`` queries of its request's chunk, and in decode its own query; the
    norm runs over all queries of the window and of the GQA group (SparK, arXiv 2508.15212, section 3, as in the
    authors' code; averaging over the group first can cancel).

    Parameters
    ----------
    q
        Queries ``[num_tokens, num_qo_heads, head_dim]``.
    num_kv_heads
        KV heads; query heads ``h * group .. (h + 1) * group - 1`` belong to KV head ``h``.
    qo_indptr
        ``[num_requests + 1]``, the tokens of request r are ``qo_indptr[r] .. qo_indptr[r + 1] - 1``. None in
        decode.
    window
        Number of queries in the window.

    Returns
    -------
    float32 ``[num_tokens, num_kv_heads, head_dim]``. Squares are added in order of token, then of query head.
    """
    num_tokens, num_qo_heads, head_dim = q.shape
    squares = q.float().square().view(num_tokens, num_kv_heads, num_qo_heads // num_kv_heads, head_dim)
    bounds = range(num_tokens + 1) if qo_indptr is None else qo_indptr.tolist()
    norms = squares.new_zeros(num_tokens, num_kv_heads, head_dim)
    for start, stop in itertools.pairwise(bounds):
        total = squares.new_zeros(num_kv_heads, head_dim)
        for token in range(max(start, stop - window), stop):
            for member in range(squares.shape[2]):
                total += squares[token, :, member]
        norms[start:stop] = total.sqrt()
    return norms


def saliency(k: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Score ``k_j**2 * norm_j`` of each channel of each key, float32 like ``norms``.

    Scores are finite whatever the input: what overflows or is NaN counts as the largest float32.
    """
    return _finite(k.float().square() * _finite(norms))


def select_channels(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` channels with the largest scores, the lower channel first among equals, in ascending order.

    int64 ``[..., count]`` for scores ``[..., head_dim]``.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def pack_keys(k: torch.Tensor, channels: torch.Tensor, key_format: CompressedKeyFormat) -> torch.Tensor:
    """Compressed rows, uint8 ``[..., row_bytes]``, for keys ``[..., head_dim]`` and kept channels ``[..., T]``.

    Keys are first limited to 65504 times ``integer_max``. Scales are rounded to float16 and then used to quantise, by
    a product with the reciprocal: the plane scale to nearest, at most 65504, the kept scale upwards, so that no integer
    exceeds its range.
    """
    finite = k.isfinite().all(-1)
    limit = FLOAT16_MAX * key_format.integer_max
    k = k.float().where(finite[..., None], 0.0).clamp(-limit, limit)
    magnitude = k.abs()
    dropped = torch.ones_like(k, dtype=torch.bool).scatter(-1, channels, False)
    plane_scale = _plane_scale(magnitude, dropped, key_format).clamp(max=FLOAT16_MAX).half()

    positive = ~k.signbit()
    large = magnitude >= 0.5 * plane_scale.float()[..., None]
    bit_planes = [positive, positive == large][: key_format.restore_bits]
    residual = k - _plane(bit_planes, plane_scale.float()[..., None], k)

    kept = residual.gather(-1, channels)
    kept_scale = _half_rounded_up(kept.abs().amax(-1) / key_format.integer_max)
    integers = (kept * (1.0 / kept_scale.float())[..., None]).round().nan_to_num(nan=0.0).to(torch.int32)
    words = (integers << key_format.index_bits | channels.to(torch.int32)).to(torch.int16)

    parts = [_pack_bits(plane) for plane in bit_planes]
    scales = (torch.where(finite, scale, math.nan) for scale in (plane_scale, kept_scale))
    parts += [scale[..., None].view(torch.uint8) for scale in scales]
    return torch.cat([*parts, words.view(torch.uint8)], dim=-1)


def unpack_keys(rows: torch.Tensor, key_format: CompressedKeyFormat | RawKeyFormat) -> torch.Tensor:
    """Keys restored from rows: uint8 ``[..., row_bytes]`` to float32 ``[..., head_dim]``."""
    if key_format.is_raw:
        return rows.contiguous().view(key_format.dtype).float()
    offset, step = key_format.plane_offset, key_format.bit_plane_bytes
    bit_planes = [
        _unpack_bits(rows[..., offset + i * step : offset + (i + 1) * step]) for i in range(key_format.restore_bits)
    ]
    scales = rows[..., key_format.scale_offset : key_format.kept_offset].contiguous().view(torch.float16).float()
    words = rows[..., key_format.kept_offset :].contiguous().view(torch.int16).to(torch.int32)
    channels = (words & (1 << key_format.index_bits) - 1).long()
    integers = (words >> key_format.index_bits).float()
    empty = torch.zeros(*rows.shape[:-1], key_format.head_dim, device=rows.device)
    return _plane(bit_planes, scales[..., :1], empty).scatter_add(-1, channels, integers * scales[..., 1:])


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(nan=FLOAT32_MAX, posinf=FLOAT32_MAX)


def _plane_scale(magnitude: torch.Tensor, dropped: torch.Tensor, key_format: CompressedKeyFormat) -> torch.Tensor:
    magnitude = magnitude.where(dropped, 0.0)
    if key_format.restore_bits == 0:
        return torch.zeros_like(magnitude[..., 0])
    if key_format.restore_bits == 2:
        return magnitude.amax(-1)
    # In ascending channel order.
    total = torch.zeros_like(magnitude[..., 0])
    for channel in range(key_format.head_dim):
        total += magnitude[..., channel]
    return total / (key_format.head_dim - key_format.kept_channels)


def _plane(bit_planes: list[torch.Tensor], scale: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    signs = [2.0 * bits.float() - 1.0 for bits in bit_planes]
    if len(signs) == 2:
        return (2.0 * signs[0] + signs[1]) * (0.25 * scale)
    return signs[0] * scale if signs else torch.zeros_like(empty)


def _half_rounded_up(x: torch.Tensor) -> torch.Tensor:
    """The smallest float16 not below a non-negative float32, at most 65504."""
    half = x.clamp(max=FLOAT16_MAX).half()
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < x.clamp(max=FLOAT16_MAX), above, half)


def _pack_bits(bits: torch.Tensor) -> torch.Tensor:
    weights = 1 << torch.arange(8, device=bits.device)
    return (bits.unflatten(-1, (-1, 8)) * weights).sum(-1).to(torch.uint8)


def _unpack_bits(packed: torch.Tensor) -> torch.Tensor:
    return (packed[..., None] >> torch.arange(8, device=packed.device, dtype=torch.uint8) & 1).flatten(-2)


def encode_values(v: torch.Tensor, value_format: ValueFormat | Int4ValueFormat, v_scale: float = 1.0) -> torch.Tensor:
    """Value rows, uint8 ``[..., row_bytes]``, of ``v / v_scale`` for values ``[..., head_dim]``.

    float16 and float8_e4m3fn saturate at their largest numbers (65504, 448), int4 at 65504.
    """
    if v_scale != 1.0:
        v = v.float() / v_scale
    if value_format.is_int4:
        return _pack_int4(v)
    if value_format.dtype in (torch.float16, torch.float8_e4m3fn) and v.dtype != value_format.dtype:
        limit = torch.finfo(value_format.dtype).max
        v = v.clamp(-limit, limit)
    return v.to(value_format.dtype).contiguous().view(torch.uint8)


def decode_values(
    rows: torch.Tensor, value_format: ValueFormat | Int4ValueFormat, v_scale: float = 1.0
) -> torch.Tensor:
    """Values read from rows: uint8 ``[..., row_bytes]`` to float32 ``[..., head_dim]``."""
    if value_format.is_int4:
        return _unpack_int4(rows, value_format) * v_scale
    return rows.contiguous().view(value_format.dtype).float() * v_scale


def _pack_int4(v: torch.Tensor) -> torch.Tensor:
    """Rows of 4-bit integers.

    The scale of a group is an eighth of its largest magnitude, rounded to the nearest float16, and negative if only
    a positive number has that magnitude: so the largest number is -8 steps, and no level is wasted on symmetry.
    """
    groups = v.float().clamp(-FLOAT16_MAX, FLOAT16_MAX).unflatten(-1, (INT4_GROUPS, -1))
    largest = groups.abs().amax(-1, keepdim=True)
    sign = torch.where(groups.amin(-1, keepdim=True) == -largest, 1.0, -1.0)
    scale = torch.where(largest.isnan(), math.nan, sign * (largest / INT4_LIMIT)).half()
    integers = (groups * (1.0 / scale.float())).where(scale.abs() > 0, 0.0).round().clamp(-INT4_LIMIT, INT4_LIMIT - 1)
    shifts = 4 * torch.arange(INT4_GROUPS, dtype=torch.int32, device=v.device)[:, None]
    words = (integers.to(torch.int32) + INT4_LIMIT << shifts).sum(-2).to(torch.int16)
    return torch.cat([words.view(torch.uint8), scale.squeeze(-1).view(torch.uint8)], dim=-1)


def _unpack_int4(rows: torch.Tensor, value_format: Int4ValueFormat) -> torch.Tensor:
    words = rows[..., : value_format.scale_offset].contiguous().view(torch.int16).to(torch.int32)
    scales = rows[..., value_format.scale_offset :].contiguous().view(torch.float16).float()
    shifts = 4 * torch.arange(INT4_GROUPS, dtype=torch.int32, device=rows.device)[:, None]
    integers = (words[..., None, :] >> shifts & 2 * INT4_LIMIT - 1) - INT4_LIMIT
    return (integers.float() * scales[..., None]).flatten(-2)


def write_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    rows: LayerRows,
    *,
    qo_indptr: torch.Tensor | None = None,
    window: int = 32,
    v_scale: float = 1.0,
) -> None:
    """Store tokens' keys and values at ``slots`` of ``rows``.

    ``q`` is ``[num_tokens, num_qo_heads, head_dim]``, ``k`` and ``v`` are ``[num_tokens, num_kv_heads, head_dim]``
    (``v`` with its own head_dim), ``slots`` is ``[num_tokens]``; for ``qo_indptr`` and ``window`` see `query_norms`.
    """
    key_format = rows.key_format
    if key_format.is_raw:
        rows.keys[slots] = k.to(key_format.dtype).contiguous().view(torch.uint8)
    else:
        scores = saliency(k, query_norms(q, k.shape[1], qo_indptr=qo_indptr, window=window))
        rows.keys[slots] = pack_keys(k, select_channels(scores, key_format.kept_channels), key_format)
    rows.values[slots] = encode_values(v, rows.value_format, v_scale)


def restore_keys(rows: LayerRows, slots: torch.Tensor) -> torch.Tensor:
    """Keys at ``slots``, float32 ``[n, num_kv_heads, head_dim]``."""
    return unpack_keys(rows.keys[slots], rows.key_format)


def restore_values(rows: LayerRows, slots: torch.Tensor, v_scale: float = 1.0) -> torch.Tensor:
    """Values at ``slots``, float32 ``[n, num_kv_heads, v_head_dim]``."""
    return decode_values(rows.values[slots], rows.value_format, v_scale)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request and its log-sum-exp, in float32.

    ``q`` is ``[n, num_qo_heads, head_dim]``, ``k`` and ``v`` are ``[m, num_kv_heads, head_dim]`` (``v`` with its own
    head_dim), ``mask`` is boolean ``[n, m]``, True where a query sees a key. With a soft cap c > 0 a logit x
    becomes ``c * tanh(x / c)``. Returns the output ``[n, num_qo_heads, v_head_dim]`` and the natural-log lse
    ``[n, num_qo_heads]``; a query that sees nothing gets 0 and -inf.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    logits = torch.einsum("nhd,mhd->hnm", q.float(), k) * sm_scale
    if logits_soft_cap > 0:
        logits = logits_soft_cap * (logits / logits_soft_cap).tanh()
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().where(lse[..., None] > -math.inf, 0.0)
    weights = weights.where(~lse.isnan()[..., None], math.nan)
    return torch.einsum("hnm,mhd->nhd", weights, v), lse.T


def decode_attention(
    q: torch.Tensor,
    rows: LayerRows,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    *,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    v_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query per request over the rows at ``kv_indices[kv_indptr[r] : kv_indptr[r + 1]]``.

    ``q`` is ``[batch, num_qo_heads, head_dim]``. Returns float32 output ``[batch, num_qo_heads, v_head_dim]`` and
    lse ``[batch, num_qo_heads]``, 0 and -inf for a request without tokens.
    """
    outputs, lses = [], []
    for request, (start, stop) in enumerate(_spans(kv_indptr)):
        slots = kv_indices[start:stop].long()
        out, lse = dense_attention(
            q[request : request + 1],
            restore_keys(rows, slots),
            restore_values(rows, slots, v_scale),
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
        )
        outputs.append(out)
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses)


def extend_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: LayerRows,
    qo_indptr: torch.Tensor,
    prefix_indptr: torch.Tensor,
    prefix_indices: torch.Tensor,
    *,
    causal: bool = True,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    v_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each request's new chunk over its restored prefix and, exactly, over itself.

    A query sees the whole prefix and the chunk's tokens up to its own, or all of them if not ``causal``. ``q``,
    ``k`` and ``v`` hold the chunks' tokens, request after request by ``qo_indptr``; the prefix of request r is the
    rows at ``prefix_indices[prefix_indptr[r] : prefix_indptr[r + 1]]``. Returns float32 output
    ``[num_tokens, num_qo_heads, v_head_dim]`` and lse ``[num_tokens, num_qo_heads]``.
    """
    out = torch.zeros(*q.shape[:2], v.shape[-1], device=q.device)
    lse = torch.zeros(q.shape[:2], device=q.device)
    for (start, stop), (first, last) in zip(_spans(qo_indptr), _spans(prefix_indptr), strict=True):
        slots = prefix_indices[first:last].long()
        n, prefix = stop - start, last - first
        mask = torch.ones(n, prefix + n, dtype=torch.bool, device=q.device)
        out[start:stop], lse[start:stop] = dense_attention(
            q[start:stop],
            torch.cat([restore_keys(rows, slots), k[start:stop].float()]),
            torch.cat([restore_values(rows, slots, v_scale), v[start:stop].float()]),
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            mask=mask.tril(prefix) if causal else mask,
        )
    return out, lse


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys from the attention over each (FlashInfer's merge_state).

    Outputs are ``[n, num_qo_heads, head_dim]``, natural-log lse are ``[n, num_qo_heads]``, -inf for an empty set.
    Returns float32.
    """
    lse = torch.logaddexp(lse_a.float(), lse_b.float())
    merged = torch.zeros_like(out_a, dtype=torch.float32)
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        weight = (part.float() - lse).exp().where(part > -math.inf, 0.0)[..., None]
        merged += (weight * out.float()).where(weight > 0, 0.0)
    return merged.where(~lse.isnan()[..., None], math.nan), lse


def _spans(indptr: torch.Tensor) -> list[tuple[int, int]]:
    bounds = indptr.tolist()
    return list(itertools.pairwise(bounds))
