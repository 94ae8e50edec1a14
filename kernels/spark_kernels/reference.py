"""The definition of every operation in plain PyTorch: readable, slow, on any device.

Kernels are tested against these functions: rows byte for byte, attention within rounding. To make the former possible,
whatever decides the bytes of a row is computed here in float32, one correctly rounded operation at a time, and sums are
of integers, whose order does not matter.

Non-finite numbers: a finite key gives a finite row. A key with a NaN or an infinity gives the row of a zero key with
NaN for its scales, so that attention over it is NaN as it would be over the key itself. Values keep their NaN; a
transformed value with a NaN is NaN in all channels.
"""

from __future__ import annotations

import itertools
import math

import torch

from spark_kernels.calibration import Restoration
from spark_kernels.formats import (
    UNIT_STEPS,
    Integers,
    KeyFormat,
    Numbers,
    Plane,
    Pruned,
    ValueFormat,
)
from spark_kernels.rows import LayerRows

FLOAT32_MAX = torch.finfo(torch.float32).max
FLOAT16_MAX = torch.finfo(torch.float16).max
# A token's tau: squares of normalised channels above CLIP do not raise it, and it is at least LEAST_TAU.
CLIP = 9.0
LEAST_TAU = 0.05
# A value whose integers would stand for less is stored as 0 (a float16 scale could not hold it), so that one over its
# scale is finite.
LEAST_REACH = 2.0**-60
# With it every number that a row of integers stands for is a float16.
LARGEST_SCALE = FLOAT16_MAX / 8
# Fixed-point units of what is summed: squares of a key's and a value's channels, and the products that fit a scale.
KEY_SQUARE_ONE = 2**16
VALUE_SQUARE_ONE = 2**22
VALUE_PRODUCT_ONE = 2**14


def query_squares(
    q: torch.Tensor, num_kv_heads: int, *, qo_indptr: torch.Tensor | None = None, window: int = 32
) -> torch.Tensor:
    """Squared norm of each query channel over the observation window of each token.

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
    sums = squares.new_zeros(num_tokens, num_kv_heads, head_dim)
    for start, stop in itertools.pairwise(bounds):
        total = squares.new_zeros(num_kv_heads, head_dim)
        for token in range(max(start, stop - window), stop):
            for member in range(squares.shape[2]):
                total += squares[token, :, member]
        sums[start:stop] = total
    return sums


def select_channels(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` positions with the largest scores, the lower one first among equals, in ascending order.

    int64 ``[..., count]`` for scores ``[..., head_dim]``.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def pack_keys(k: torch.Tensor, squares: torch.Tensor, restoration: Restoration, key_format: Pruned) -> torch.Tensor:
    """Pruned rows, uint8 ``[num_tokens, num_kv_heads, row_bytes]``.

    Parameters
    ----------
    k, squares
        Keys ``[num_tokens, num_kv_heads, head_dim]`` and what `query_squares` gives for them. A key is first limited
        to 65504 times ``integer_max``.
    restoration
        The layer's (`LayerRows.restoration`).
    """
    finite = k.isfinite().all(-1, keepdim=True)
    limit = FLOAT16_MAX * key_format.integer_max
    order = restoration.order.long().expand_as(k)
    x = k.float().where(finite, 0.0).clamp(-limit, limit).gather(-1, order) - restoration.centre
    tau = _tau(x * restoration.inverse_step, key_format)

    codes = _codes(x * restoration.inverse_unit * (1.0 / tau.float()), key_format)
    residual = x - _restored(codes, tau.float(), restoration, key_format)
    # An error in a channel moves scores by at most the norm of the queries there, times the error.
    scores = _finite(residual.square() * _finite(squares.gather(-1, order)))
    kept = select_channels(scores, key_format.kept_channels)
    error = residual.gather(-1, kept)
    kappa = _half_rounded_up(error.abs().amax(-1, keepdim=True) / key_format.integer_max)
    integers = (error * (1.0 / kappa.float())).round().nan_to_num(nan=0.0).to(torch.int32)
    signed_positions = (integers < 0).to(torch.int32) << key_format.position_bits | kept.to(torch.int32)
    words = (signed_positions << key_format.magnitude_bits | integers.abs()).to(torch.int16)

    scales = (torch.where(finite, scale, math.nan) for scale in (tau, kappa))
    parts = [_pack_plane(codes, plane) for plane in key_format.planes]
    parts += [part.view(torch.uint8) for part in (*scales, words)]
    return _padded(torch.cat(parts, dim=-1), key_format.row_bytes)


def unpack_keys(rows: torch.Tensor, restoration: Restoration | None, key_format: KeyFormat) -> torch.Tensor:
    """Keys restored from rows: uint8 ``[num_tokens, num_kv_heads, row_bytes]`` to float32 ``[..., head_dim]``."""
    if isinstance(key_format, Numbers):
        return rows.contiguous().view(key_format.dtype).float()
    tau, kappa = _halves(rows, key_format.scale_offset, 2).float().split(1, dim=-1)
    words = _halves(rows, key_format.kept_offset, key_format.kept_channels).view(torch.int16).to(torch.int32) & 0xFFFF
    magnitudes = (words & key_format.integer_max).float()
    integers = torch.where(words >> 15 == 1, -magnitudes, magnitudes)
    kept = (words >> key_format.magnitude_bits & (1 << key_format.position_bits) - 1).long()
    codes = torch.zeros(*rows.shape[:-1], key_format.head_dim, dtype=torch.int32, device=rows.device)
    for plane in key_format.planes:
        codes[..., plane.start : plane.start + plane.channels] = _unpack_plane(rows, plane)
    x = _restored(codes, tau, restoration, key_format).scatter_add(-1, kept, integers * kappa)
    return (restoration.centre + x).gather(-1, restoration.position.long().expand_as(x))


def _tau(normalised: torch.Tensor, key_format: Pruned) -> torch.Tensor:
    """float16 ``[..., 1]``: root mean square of a key's normalised channels, with squares above `CLIP` cut."""
    count = key_format.restored_channels
    if count == 0:
        return torch.zeros_like(normalised[..., :1], dtype=torch.float16)
    squares = (normalised[..., :count].square().clamp(max=CLIP) * KEY_SQUARE_ONE).to(torch.int32)
    mean = squares.sum(-1, keepdim=True).float() * (1.0 / (count * KEY_SQUARE_ONE))
    return _root(mean).clamp(min=LEAST_TAU).half()


def _codes(levels: torch.Tensor, key_format: Pruned) -> torch.Tensor:
    """Codes, int32, of keys in units of their channels."""
    half = _half_levels(key_format, levels.device)
    return ((levels.floor().maximum(-half).minimum(half - 1.0)) + half).to(torch.int32).where(half > 0, 0)


def _restored(codes: torch.Tensor, tau: torch.Tensor, restoration: Restoration, key_format: Pruned) -> torch.Tensor:
    """What codes stand for, by position, without the centre."""
    return (codes + (0.5 - _half_levels(key_format, codes.device))) * (restoration.unit * tau)


def _half_levels(key_format: Pruned, device: torch.device) -> torch.Tensor:
    """float32 ``[head_dim]``: ``2 ** (bits - 1)`` of each position, 0 without bits."""
    half = torch.zeros(key_format.head_dim, device=device)
    for plane in key_format.planes:
        half[plane.start : plane.start + plane.channels] = 2.0 ** (plane.bits - 1)
    return half


def _root(x: torch.Tensor) -> torch.Tensor:
    """The correctly rounded square root of float32 numbers; PyTorch's own can be the neighbour of it on a CPU."""
    return x.double().sqrt().float()


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(nan=FLOAT32_MAX, posinf=FLOAT32_MAX)


def _half_rounded_up(x: torch.Tensor) -> torch.Tensor:
    """The smallest float16 not below a non-negative float32, at most 65504."""
    half = x.clamp(max=FLOAT16_MAX).half()
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < x.clamp(max=FLOAT16_MAX), above, half)


def _pack_plane(codes: torch.Tensor, plane: Plane) -> torch.Tensor:
    """Bytes of a plane, of the codes of all channels."""
    mine = codes[..., plane.start : plane.start + plane.channels] >> plane.shift & (1 << plane.bits) - 1
    shifts = plane.bits * torch.arange(8 // plane.bits, dtype=torch.int32, device=codes.device)
    return (mine.unflatten(-1, (-1, 8 // plane.bits)) << shifts).sum(-1).to(torch.uint8)


def _unpack_plane(rows: torch.Tensor, plane: Plane) -> torch.Tensor:
    """int32 ``[..., plane.channels]``, in place in the integers they are part of."""
    packed = rows[..., plane.offset : plane.end, None].to(torch.int32)
    shifts = plane.bits * torch.arange(8 // plane.bits, dtype=torch.int32, device=rows.device)
    return (packed >> shifts & (1 << plane.bits) - 1).flatten(-2) << plane.shift


def _halves(rows: torch.Tensor, offset: int, count: int) -> torch.Tensor:
    return rows[..., offset : offset + 2 * count].contiguous().view(torch.float16)


def _padded(row: torch.Tensor, row_bytes: int) -> torch.Tensor:
    return torch.nn.functional.pad(row, (0, row_bytes - row.shape[-1]))


def hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """Sums and differences of all channels in blocks of ``block``, a power of two: ``block`` times its own inverse."""
    width = 1
    while width < block:
        a, b = x.unflatten(-1, (-1, 2, width)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        width *= 2
    return x


def encode_values(v: torch.Tensor, value_format: ValueFormat, v_scale: float = 1.0) -> torch.Tensor:
    """Value rows, uint8 ``[..., row_bytes]``, of ``v / v_scale`` for values ``[..., head_dim]``.

    float16 and float8_e4m3fn saturate at their largest numbers (65504, 448), transformed integers at 65504.
    """
    if v_scale != 1.0:
        v = v.float() / v_scale
    if isinstance(value_format, Integers):
        return _pack_integers(v, value_format)
    if value_format.dtype in (torch.float16, torch.float8_e4m3fn) and v.dtype != value_format.dtype:
        limit = torch.finfo(value_format.dtype).max
        v = v.clamp(-limit, limit)
    return v.to(value_format.dtype).contiguous().view(torch.uint8)


def decode_values(rows: torch.Tensor, value_format: ValueFormat, v_scale: float = 1.0) -> torch.Tensor:
    """Values read from rows: uint8 ``[..., row_bytes]`` to float32 ``[..., head_dim]``."""
    if isinstance(value_format, Integers):
        return _unpack_integers(rows, value_format) * v_scale
    return rows.contiguous().view(value_format.dtype).float() * v_scale


def hadamard_scales(block: int) -> tuple[float, float]:
    """Powers of two to multiply a transform of ``block`` channels by, forward and backward: ``1 / block`` in all.

    Powers of two lose nothing, and near its square root each keeps a value's magnitude.
    """
    stages = block.bit_length() - 1
    return 2.0 ** -(stages // 2), 2.0 ** -(stages - stages // 2)


def _pack_integers(v: torch.Tensor, value_format: Integers) -> torch.Tensor:
    """Rows of a transformed value's codes.

    The scale is first halfway between what suits a normal distribution of the value's deviation and what reaches its
    largest number, not above the latter; then the one with the least squared error for the codes that this gives.
    """
    half = 2.0 ** (value_format.bits - 1)
    y = hadamard(v.float().clamp(-FLOAT16_MAX, FLOAT16_MAX), value_format.block)
    y = y * hadamard_scales(value_format.block)[0]
    reach = y.abs().amax(-1, keepdim=True) * (1.0 / half)
    reach = torch.where(reach < LEAST_REACH, 0.0, reach)
    scale = torch.minimum(reach, 0.5 * (_deviation(y, reach * half) * UNIT_STEPS[value_format.bits] + reach))

    levels = y * (1.0 / scale)
    levels = levels.where(scale > 0, 0.0)
    odd = 2.0 * (levels.floor().clamp(-half, half - 1.0)) + 1.0
    product = (levels * odd * VALUE_PRODUCT_ONE).to(torch.int32).sum(-1, keepdim=True).float()
    square = odd.to(torch.int32).square().sum(-1, keepdim=True).float()
    scale = (scale * (product / square) * (2.0 / VALUE_PRODUCT_ONE)).clamp(max=LARGEST_SCALE).half()
    scale = torch.where(scale.isnan(), math.nan, scale)

    levels = (y * (1.0 / scale.float())).where(scale > 0, 0.0)
    codes = (levels.floor().clamp(-half, half - 1.0) + half).to(torch.int32)
    parts = [_pack_plane(codes, plane) for plane in value_format.planes]
    return _padded(torch.cat([*parts, scale.view(torch.uint8)], dim=-1), value_format.row_bytes)


def _deviation(y: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Root mean square of the last dimension, whose largest magnitude is ``largest``."""
    squares = (y * (1.0 / largest)).square().where(largest > 0, 0.0)
    mean = (squares * VALUE_SQUARE_ONE).to(torch.int32).sum(-1, keepdim=True).float()
    return _root(mean * (1.0 / (y.shape[-1] * VALUE_SQUARE_ONE))) * largest


def _unpack_integers(rows: torch.Tensor, value_format: Integers) -> torch.Tensor:
    codes = sum(_unpack_plane(rows, plane) for plane in value_format.planes)
    y = (codes + (0.5 - 2.0 ** (value_format.bits - 1))) * _halves(rows, value_format.scale_offset, 1).float()
    return hadamard(y, value_format.block) * hadamard_scales(value_format.block)[1]


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
    (``v`` with its own head_dim), ``slots`` is ``[num_tokens]``; for ``qo_indptr`` and ``window`` see `query_squares`.
    """
    key_format = rows.key_format
    if isinstance(key_format, Numbers):
        rows.keys[slots] = k.to(key_format.dtype).contiguous().view(torch.uint8)
    else:
        squares = query_squares(q, k.shape[1], qo_indptr=qo_indptr, window=window)
        rows.keys[slots] = pack_keys(k, squares, rows.restoration, key_format)
    rows.values[slots] = encode_values(v, rows.value_format, v_scale)


def restore_keys(rows: LayerRows, slots: torch.Tensor) -> torch.Tensor:
    """Keys at ``slots``, float32 ``[n, num_kv_heads, head_dim]``."""
    restoration = rows.restoration if isinstance(rows.key_format, Pruned) else None
    return unpack_keys(rows.keys[slots], restoration, rows.key_format)


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
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one request and its log-sum-exp, in float32.

    ``q`` is ``[n, num_qo_heads, head_dim]``, ``k`` and ``v`` are ``[m, num_kv_heads, head_dim]`` (``v`` with its own
    head_dim), ``mask`` is boolean ``[n, m]``, True where a query sees a key. With a soft cap c > 0 a logit x
    becomes ``c * tanh(x / c)``. ``sinks``, ``[num_qo_heads]``, is the logit of one key more per head, whose value is 0.
    Returns the output ``[n, num_qo_heads, v_head_dim]`` and the natural-log lse ``[n, num_qo_heads]``; a query that
    sees nothing gets 0 and -inf.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    logits = torch.einsum("nhd,mhd->hnm", q.float(), k) * sm_scale
    if logits_soft_cap > 0:
        logits = logits_soft_cap * (logits / logits_soft_cap).tanh()
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None, None].expand(-1, len(q), 1)], dim=2)
        v = torch.cat([v, v.new_zeros(1, *v.shape[1:])])
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
    sinks: torch.Tensor | None = None,
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
            sinks=sinks,
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
    sinks: torch.Tensor | None = None,
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
            sinks=sinks,
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
