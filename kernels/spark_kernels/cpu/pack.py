"""Keys to compressed rows: the observation window's norms, the selection of channels and the packing.

The arithmetic follows `spark_kernels.reference` operation by operation, so no function here may be compiled with
reordered sums or fused multiplications.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.numbers import float_to_bits, float_to_half, half_to_float
from spark_kernels.cpu.threads import call_parallel
from spark_kernels.record import CompressedKeyFormat, LayerRows
from spark_kernels.reference import encode_values

_FLOAT32_MAX = np.float32(torch.finfo(torch.float32).max)
_FLOAT16_MAX = np.float32(torch.finfo(torch.float16).max)
_HALF_NAN = np.uint16(0x7E00)


@kernel()
def _limited(x):
    """A non-negative number, or the largest one for infinity and NaN."""
    return x if x <= _FLOAT32_MAX else _FLOAT32_MAX


@kernel(parallel=True)
def _window_norms(q, bounds, window, norms):
    heads = norms.shape[1]
    group = q.shape[1] // heads
    for work in prange((bounds.shape[0] - 1) * heads):
        request = work // heads
        head = work % heads
        stop = bounds[request + 1]
        total = norms[request, head]
        total[:] = np.float32(0.0)
        for token in range(max(bounds[request], stop - window), stop):
            for member in range(head * group, (head + 1) * group):
                for j in range(q.shape[2]):
                    total[j] += q[token, member, j] * q[token, member, j]
        for j in range(q.shape[2]):
            total[j] = np.sqrt(total[j])


@kernel()
def _smallest_kept_score(score_bits, count):
    """The largest b with at least ``count`` of ``score_bits`` not below it."""
    threshold = np.uint32(0)
    for bit in range(30, -1, -1):
        candidate = threshold | np.uint32(1 << bit)
        reached = np.uint32(0)
        for j in range(score_bits.shape[0]):
            reached += np.uint32(score_bits[j] >= candidate)
        if reached >= count:
            threshold = candidate
    return threshold


@kernel()
def _select(k, norm, count, kept):
    """Set ``kept`` to 1 for the ``count`` most salient channels, to 0 for the others."""
    # Scores are finite and not negative, so their bits are in their order.
    score_bits = np.empty(k.shape[0], np.uint32)
    for j in range(k.shape[0]):
        score_bits[j] = float_to_bits(_limited(_limited(k[j] * k[j]) * _limited(norm[j])))
    threshold = _smallest_kept_score(score_bits, count)
    room = count
    for j in range(k.shape[0]):
        kept[j] = score_bits[j] > threshold
        room -= kept[j]
    for j in range(k.shape[0]):
        if score_bits[j] == threshold and room > 0:
            kept[j] = 1
            room -= 1


@kernel()
def _plane_scale(k, kept, kept_channels, restore_bits):
    scale = np.float32(0.0)
    if restore_bits == 2:
        for j in range(k.shape[0]):
            if kept[j] == 0:
                scale = max(scale, abs(k[j]))
    elif restore_bits == 1:
        limit = np.float32(_FLOAT32_MAX / k.shape[0])
        for j in range(k.shape[0]):
            if kept[j] == 0:
                scale += min(abs(k[j]), limit)
        scale /= np.float32(k.shape[0] - kept_channels)
    return float_to_half(min(scale, _FLOAT16_MAX))


@kernel()
def _half_rounded_up(x):
    x = min(x, _FLOAT16_MAX)
    half = float_to_half(x)
    return np.uint16(half + 1) if half_to_float(half) < x else half


@kernel()
def _pack_row(k, norm, restore_bits, kept_channels, index_bits, integer_max, second_plane, scale_offset, row):
    head_dim = k.shape[0]
    kept = np.empty(head_dim, np.uint8)
    _select(k, norm, kept_channels, kept)
    finite = True
    for j in range(head_dim):
        finite &= np.isfinite(k[j])

    scales = row[scale_offset : scale_offset + 4].view(np.uint16)
    scales[0] = _plane_scale(k, kept, kept_channels, restore_bits) if finite else _HALF_NAN
    plane_scale = half_to_float(scales[0])
    residual = np.empty(head_dim, np.float32)
    for i in range(head_dim // 8):
        high = 0
        low = 0
        for bit in range(8):
            x = k[8 * i + bit]
            positive = not x < 0
            large = abs(x) >= np.float32(0.5) * plane_scale
            high |= positive << bit
            low |= (positive == large) << bit
            sign = np.float32(1.0) if positive else np.float32(-1.0)
            plane = np.float32(0.0)
            if restore_bits == 2:
                level = np.float32(2.0) * sign + (np.float32(1.0) if positive == large else np.float32(-1.0))
                plane = level * (np.float32(0.25) * plane_scale)
            elif restore_bits == 1:
                plane = sign * plane_scale
            residual[8 * i + bit] = x - plane
        if restore_bits >= 1:
            row[i] = high
        if restore_bits == 2:
            row[second_plane + i] = low

    largest = np.float32(0.0)
    for j in range(head_dim):
        if kept[j]:
            largest = max(largest, abs(residual[j]))
    scales[1] = _half_rounded_up(largest / np.float32(integer_max)) if finite else _HALF_NAN
    kept_scale = half_to_float(scales[1])
    words = row[scale_offset + 4 :].view(np.int16)
    room = 0
    for j in range(head_dim):
        if kept[j]:
            integer = 0
            if kept_scale > 0:
                limit = np.float32(integer_max)
                integer = np.int32(min(max(np.rint(residual[j] / kept_scale), -limit), limit))
            words[room] = np.int16(integer << index_bits | j)
            room += 1


@kernel(parallel=True)
def _pack(k, norms, norm_of, layout, slots, rows):
    restore_bits, kept_channels, index_bits, integer_max, second_plane, scale_offset = layout
    heads = k.shape[1]
    for work in prange(k.shape[0] * heads):
        token = work // heads
        head = work % heads
        _pack_row(
            k[token, head],
            norms[norm_of[token], head],
            restore_bits,
            kept_channels,
            index_bits,
            integer_max,
            second_plane,
            scale_offset,
            rows[slots[token], head],
        )


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
    """See `spark_kernels.reference.write_rows`."""
    slots = slots.to(torch.int64)
    if rows.key_format.is_raw:
        store(k.to(rows.key_format.dtype), slots, rows.keys)
    else:
        _write_keys(q, k, slots, rows.keys, rows.key_format, qo_indptr, window)
    store(encode_values(v, rows.value_format, v_scale), slots, rows.values)


def store(numbers: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy dense numbers ``[n, num_kv_heads, head_dim]`` to rows of as many bytes."""
    # Rows are multiples of 8 bytes; whole words copy fastest.
    rows.view(torch.int64)[slots] = numbers.contiguous().view(torch.int64)


def _write_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    key_format: CompressedKeyFormat,
    qo_indptr: torch.Tensor | None,
    window: int,
) -> None:
    num_tokens, num_kv_heads, head_dim = k.shape
    if qo_indptr is None:
        bounds = np.arange(num_tokens + 1)
    else:
        bounds = qo_indptr.to(torch.int64).numpy()
    norms = np.empty((bounds.shape[0] - 1, num_kv_heads, head_dim), np.float32)
    norm_of = np.repeat(np.arange(bounds.shape[0] - 1), np.diff(bounds))
    layout = (
        key_format.restore_bits,
        key_format.kept_channels,
        key_format.index_bits,
        key_format.integer_max,
        key_format.plane_offset + key_format.bit_plane_bytes,
        key_format.scale_offset,
    )
    call_parallel(_window_norms, q.float().contiguous().numpy(), bounds, window, norms)
    call_parallel(_pack, k.float().contiguous().numpy(), norms, norm_of, layout, slots.numpy(), keys.numpy())
