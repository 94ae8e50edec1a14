"""New tokens to rows in one launch: selection of channels, packing of keys, encoding of values.

A program has one token's key and value of one KV head, a warp wide, and keeps everything in registers. In extend a
small kernel before it sums up each request's observation window.

The arithmetic follows `spark_kernels.reference` operation by operation, so these kernels are compiled without fused
multiplications and with correctly rounded divisions and square roots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_kernels.gpu.rows import check_head_dim
from spark_kernels.gpu.scores import RowLayout
from spark_kernels.gpu.values import FLOAT16_MAX, HALF_NAN, ROUNDER, store_value, written_values
from spark_kernels.record import LayerRows

_FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _limited(x):
    """A non-negative number, or the largest one for infinity and NaN."""
    return tl.where(x <= _FLOAT32_MAX, x, _FLOAT32_MAX)


@triton.jit
def _add_squares(total, q_ptr, q_stride_head, head, GROUP: tl.constexpr, channels):
    """Add the squares of one token's queries of a KV head, in order."""
    for member in range(GROUP):
        q = tl.load(q_ptr + (head * GROUP + member) * q_stride_head + channels).to(tl.float32)
        total += q * q
    return total


@triton.jit
def _window_norms(
    q_ptr,
    q_stride_token,
    q_stride_head,
    qo_indptr_ptr,
    norms_ptr,
    window,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """One program per (request, KV head)."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channels = tl.arange(0, HEAD_DIM)
    start = tl.load(qo_indptr_ptr + request).to(tl.int64)
    stop = tl.load(qo_indptr_ptr + request + 1).to(tl.int64)
    total = tl.zeros([HEAD_DIM], tl.float32)
    for token in range(tl.maximum(start, stop - window), stop):
        total = _add_squares(total, q_ptr + token * q_stride_token, q_stride_head, head, GROUP, channels)
    tl.store(norms_ptr + (request * NUM_KV_HEADS + head) * HEAD_DIM + channels, tl.sqrt_rn(total))


@triton.jit
def _select(k, norm, COUNT: tl.constexpr):
    """Mask of the ``COUNT`` most salient channels."""
    # Scores are finite and not negative, so their bits are in their order.
    bits = _limited(_limited(k * k) * _limited(norm)).to(tl.int32, bitcast=True)
    threshold = 0
    for step in range(31):
        candidate = threshold | (1 << (30 - step))
        reached = tl.sum((bits >= candidate).to(tl.int32), 0)
        threshold = tl.where(reached >= COUNT, candidate, threshold)
    above = bits > threshold
    ties = bits == threshold
    room = COUNT - tl.sum(above.to(tl.int32), 0)
    return above | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= room))


@triton.jit
def _half_bits(x):
    return x.to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def _half_value(bits):
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _plane_scale(magnitude, kept, channels, LAYOUT: tl.constexpr):
    dropped = tl.where(kept, 0.0, magnitude)
    if LAYOUT.restore_bits == 2:
        scale = tl.max(dropped, 0)
    else:
        # One after the other: the order of a sum decides its last bits.
        limited = tl.minimum(dropped, _FLOAT32_MAX / LAYOUT.head_dim)
        scale = 0.0
        for channel in range(LAYOUT.head_dim):
            scale += tl.sum(tl.where(channels == channel, limited, 0.0), 0)
        scale = tl.div_rn(scale, (LAYOUT.head_dim - LAYOUT.kept_channels) * 1.0)
    return _half_bits(tl.minimum(scale, FLOAT16_MAX))


@triton.jit
def _half_rounded_up(x):
    """Bits of the smallest float16 not below a non-negative float32, at most 65504."""
    x = tl.minimum(x, FLOAT16_MAX)
    bits = _half_bits(x)
    return tl.where(_half_value(bits) < x, bits + 1, bits).to(tl.int16)


@triton.jit
def _store_bit_plane(row, plane, HEAD_DIM: tl.constexpr):
    bits = tl.reshape(plane.to(tl.int32), [HEAD_DIM // 8, 8]) << tl.arange(0, 8)[None, :]
    tl.store(row + tl.arange(0, HEAD_DIM // 8), tl.sum(bits, 1).to(tl.uint8))


@triton.jit
def _store_key(k, norm, row, LAYOUT: tl.constexpr, INTEGER_MAX: tl.constexpr):
    """Pack one key into the bytes at ``row``."""
    D: tl.constexpr = LAYOUT.head_dim
    channels = tl.arange(0, D)
    halves = row.to(tl.pointer_type(tl.int16))
    kept = _select(k, norm, LAYOUT.kept_channels)
    magnitude = tl.abs(k)
    finite = tl.sum((magnitude <= _FLOAT32_MAX).to(tl.int32), 0) == D

    residual = k
    plane_bits = tl.full([], 0, tl.int16)
    if LAYOUT.restore_bits > 0:
        plane_bits = _plane_scale(magnitude, kept, channels, LAYOUT)
        plane_scale = tl.where(finite, _half_value(plane_bits), 0.0)
        positive = k >= 0
        sign = tl.where(positive, 1.0, -1.0)
        _store_bit_plane(row + LAYOUT.plane_word * 8, positive, D)
        if LAYOUT.restore_bits == 2:
            # A magnitude is large against a NaN nowhere.
            large = (magnitude >= 0.5 * plane_scale) & finite
            low = positive == large
            _store_bit_plane(row + LAYOUT.plane_word * 8 + D // 8, low, D)
            residual = k - (2.0 * sign + tl.where(low, 1.0, -1.0)) * (0.25 * plane_scale)
        else:
            residual = k - sign * plane_scale

    largest = tl.max(tl.where(kept, tl.abs(residual), 0.0), 0)
    kept_bits = _half_rounded_up(tl.div_rn(largest, INTEGER_MAX * 1.0))
    kept_scale = _half_value(kept_bits)
    ratio = tl.div_rn(residual, tl.where(kept_scale > 0, kept_scale, 1.0) + tl.zeros_like(residual))
    ratio = tl.minimum(tl.maximum(ratio, -INTEGER_MAX * 1.0), INTEGER_MAX * 1.0)
    integers = ((ratio + ROUNDER) - ROUNDER).to(tl.int32)
    integers = tl.where((kept_scale > 0) & finite, integers, 0)
    tl.store(halves + LAYOUT.scale_half, tl.where(finite, plane_bits, HALF_NAN).to(tl.int16))
    tl.store(halves + LAYOUT.scale_half + 1, tl.where(finite, kept_bits, HALF_NAN).to(tl.int16))
    words = ((integers << LAYOUT.index_bits) | channels).to(tl.int16)
    tl.store(halves + LAYOUT.kept_half + tl.cumsum(kept.to(tl.int32), 0) - 1, words, mask=kept)


@triton.jit
def _write_rows(
    q_ptr,
    q_stride_token,
    q_stride_head,
    k_ptr,
    k_stride_token,
    k_stride_head,
    v_ptr,
    v_stride_token,
    v_stride_head,
    slots_ptr,
    norms_ptr,
    norm_of_ptr,
    keys_ptr,
    values_ptr,
    v_scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    INTEGER_MAX: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    V_SCALED: tl.constexpr,
    V_LIMIT: tl.constexpr,
):
    """One program per (token, KV head); ``LAYOUT`` is None for raw keys. For values see `written_values`."""
    token = (tl.program_id(0) // NUM_KV_HEADS).to(tl.int64)
    head = tl.program_id(0) % NUM_KV_HEADS
    row_of_head = tl.load(slots_ptr + token).to(tl.int64) * NUM_KV_HEADS + head
    v_row = v_ptr + token * v_stride_token + head * v_stride_head
    store_value(v_row, v_scale, values_ptr, row_of_head, V_HEAD_DIM, V_LAYOUT, V_SCALED, V_LIMIT)

    channels = tl.arange(0, HEAD_DIM)
    k = tl.load(k_ptr + token * k_stride_token + head * k_stride_head + channels)
    if LAYOUT is None:
        tl.store(keys_ptr + row_of_head * HEAD_DIM + channels, k.to(keys_ptr.dtype.element_ty))
    else:
        if HAS_NORMS:
            request = tl.load(norm_of_ptr + token).to(tl.int64)
            norm = tl.load(norms_ptr + (request * NUM_KV_HEADS + head) * HEAD_DIM + channels)
        else:
            zero = tl.zeros([HEAD_DIM], tl.float32)
            norm = tl.sqrt_rn(_add_squares(zero, q_ptr + token * q_stride_token, q_stride_head, head, GROUP, channels))
        row = keys_ptr + row_of_head * (8 * LAYOUT.row_words)
        _store_key(k.to(tl.float32), norm, row, LAYOUT, INTEGER_MAX)


def write_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    rows: LayerRows,
    *,
    qo_indptr: torch.Tensor | None,
    window: int,
    v_scale: float,
) -> None:
    """See `spark_kernels.reference.write_rows`; nothing is read on the host."""
    num_tokens, num_kv_heads, head_dim = k.shape
    key_format = rows.key_format
    check_head_dim(head_dim)
    check_head_dim(rows.value_format.head_dim)
    if num_tokens == 0:
        return
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    group = q.shape[1] // num_kv_heads
    norms = norm_of = q
    has_norms = qo_indptr is not None and not key_format.is_raw
    if has_norms:
        norms, norm_of = window_norms(q, num_kv_heads, qo_indptr, window)
    values, value_arguments = written_values(rows, v, v_scale)
    _write_rows[(num_tokens * num_kv_heads,)](
        q,
        q.stride(0),
        q.stride(1),
        k,
        k.stride(0),
        k.stride(1),
        v,
        v.stride(0),
        v.stride(1),
        slots,
        norms,
        norm_of,
        rows.keys.view(key_format.dtype) if key_format.is_raw else rows.keys,
        values,
        v_scale,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        LAYOUT=None if key_format.is_raw else RowLayout.of(key_format),
        INTEGER_MAX=0 if key_format.is_raw else key_format.integer_max,
        HAS_NORMS=has_norms,
        **value_arguments,
        num_warps=1,
        enable_fp_fusion=False,
    )


def window_norms(
    q: torch.Tensor, num_kv_heads: int, qo_indptr: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query norms of each request, float32 ``[num_requests, num_kv_heads, head_dim]``, and each token's request."""
    num_tokens, num_qo_heads, head_dim = q.shape
    num_requests = qo_indptr.shape[0] - 1
    norms = torch.empty(num_requests, num_kv_heads, head_dim, dtype=torch.float32, device=q.device)
    _window_norms[(num_requests, num_kv_heads)](
        q,
        q.stride(0),
        q.stride(1),
        qo_indptr,
        norms,
        window,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_qo_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        num_warps=1,
        enable_fp_fusion=False,
    )
    tokens = torch.arange(num_tokens, dtype=qo_indptr.dtype, device=q.device)
    return norms, torch.searchsorted(qo_indptr[1:].contiguous(), tokens, right=True, out_int32=True)
