"""Keys to compressed rows: the observation window's norms, the selection of channels and the packing.

The arithmetic follows `spark_kernels.reference` operation by operation, so no function here may be compiled with
reordered sums or fused multiplications.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from spark_kernels.cpu import memory, vectors
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.numbers import bits_to_float, float_to_half, half_to_float
from spark_kernels.cpu.threads import call_parallel
from spark_kernels.cpu.values import write_int4
from spark_kernels.cpu.vector_types import LANES
from spark_kernels.formats import CompressedKeyFormat, LayerRows
from spark_kernels.reference import encode_values

_FLOAT32_MAX = np.float32(torch.finfo(torch.float32).max)
_FLOAT16_MAX = np.float32(torch.finfo(torch.float16).max)
_HALF_NAN = np.uint16(0x7E00)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)


@kernel()
def _limited(x):
    """A non-negative number, or the largest one for infinity and NaN."""
    return x if x <= _FLOAT32_MAX else _FLOAT32_MAX


@kernel(parallel=True)
def _norms(q, bounds, norms):
    """Norms over the queries ``q[bounds[r] : bounds[r + 1]]`` of each request r and over the group."""
    heads = norms.shape[1]
    group = q.shape[1] // heads
    for work in prange((bounds.shape[0] - 1) * heads):
        request = work // heads
        head = work % heads
        total = norms[request, head]
        total[:] = np.float32(0.0)
        for token in range(bounds[request], bounds[request + 1]):
            for member in range(head * group, (head + 1) * group):
                for j in range(q.shape[2]):
                    total[j] += q[token, member, j] * q[token, member, j]
        for j in range(q.shape[2]):
            total[j] = np.sqrt(total[j])


@kernel()
def _threshold(scores, wanted):
    """The largest number that ``wanted`` of the ``scores`` reach, or a smaller one that just as many reach.

    Returns it and how many reach it: more than ``wanted`` only if some are equal to it.
    """
    # Bit by bit from the highest: numbers that are not negative are in the order of their bits.
    threshold = np.uint32(0)
    reaching = scores.shape[1]
    for bit in range(30, -1, -1):
        candidate = threshold | np.uint32(1 << bit)
        level = vectors.splat(bits_to_float(candidate))
        reached = 0
        for j in range(0, scores.shape[1], LANES):
            reached += vectors.count(vectors.at_least(memory.load(scores, 0, j), level))
        if reached >= wanted:
            threshold = candidate
            reaching = reached
            if reached == wanted:
                break
    return bits_to_float(threshold), reaching


@kernel()
def _select(k, norm, wanted, channels, kept):
    """Put the ``wanted`` most salient channels into ``channels``, and into ``kept`` 1 for each of them and 0 elsewhere.

    ``channels`` has room for one more.
    """
    scores = np.empty((1, k.shape[0]), np.float32)
    for j in range(k.shape[0]):
        scores[0, j] = _limited(k[j] * k[j] * _limited(norm[j]))
    threshold, reaching = _threshold(scores, wanted)
    for j in range(k.shape[0]):
        kept[j] = scores[0, j] >= threshold
    j = k.shape[0] - 1
    while reaching > wanted:
        if scores[0, j] == threshold:
            kept[j] = 0
            reaching -= 1
        j -= 1
    # Without a branch: which channels are kept is not predictable.
    n = np.uint64(0)
    for j in range(k.shape[0]):
        channels[n] = j
        n += np.uint64(kept[j])


@kernel()
def _largest_magnitude(k):
    """Bits of the largest magnitude in ``k``; those of infinity or above where a number is not finite."""
    # As integers, magnitudes are in order and NaN is above all: such loops vectorise.
    bits = k.view(np.uint32)
    largest = np.uint32(0)
    for j in range(bits.shape[0]):
        largest = max(largest, bits[j] & _MAGNITUDE)
    return largest


@kernel()
def _limited_key(k, limit, finite):
    """A key whose channels are limited to ``limit``, or zeros if it is not finite; ``[1, head_dim]``."""
    key = np.zeros((1, k.shape[0]), np.float32)
    if finite:
        for j in range(k.shape[0]):
            key[0, j] = min(max(k[j], -limit), limit)
    return key


@kernel()
def _plane_scale(dropped, dropped_channels, restore_bits):
    scale = np.float32(0.0)
    if restore_bits == 2:
        largest = vectors.splat(scale)
        for j in range(0, dropped.shape[1], LANES):
            largest = vectors.larger(largest, memory.load(dropped, 0, j))
        scale = vectors.largest(largest)
    elif restore_bits == 1:
        for j in range(dropped.shape[1]):
            scale += dropped[0, j]
        scale /= np.float32(dropped_channels)
    return float_to_half(min(scale, _FLOAT16_MAX))


@kernel()
def _half_rounded_up(x):
    x = min(x, _FLOAT16_MAX)
    half = float_to_half(x)
    return np.uint16(half + 1) if half_to_float(half) < x else half


@kernel()
def _fill_plane(key, plane_scale, restore_bits, halves, second_plane, residual):
    """Write the bit planes of ``key``, ``[1, head_dim]``, and what they leave of it."""
    half = np.float32(0.5) * plane_scale
    for j in range(0, residual.shape[1], LANES):
        x = memory.load(key, 0, j)
        piece = j // LANES
        high = ~vectors.signs(x)
        large = vectors.at_least(x, vectors.splat(half)) | vectors.at_least(vectors.splat(-half), x)
        low = ~(high ^ large)
        if restore_bits == 2:
            halves[piece] = high
            halves[second_plane + piece] = low
            quarter = np.float32(0.25) * plane_scale
            x = vectors.subtract(x, vectors.add(vectors.signed(high, half), vectors.signed(low, quarter)))
        elif restore_bits == 1:
            halves[piece] = high
            x = vectors.subtract(x, vectors.signed(high, plane_scale))
        memory.store(residual, 0, j, x)


@kernel()
def _pack_row(k, i, norm, layout, row):
    """Select and pack row ``i`` of the keys ``k``."""
    restore_bits, kept_channels, index_bits, integer_max, second_plane, scales = layout
    head_dim = k.shape[1]
    channels = np.empty(kept_channels + 1, np.int32)
    is_kept = np.empty(head_dim, np.uint8)
    _select(k[i], norm, kept_channels, channels, is_kept)
    magnitude = _largest_magnitude(k[i])
    finite = magnitude < _INFINITY
    limit = _FLOAT16_MAX * np.float32(integer_max)
    key = k[i].reshape((1, head_dim))
    if not finite or bits_to_float(magnitude) > limit:
        key = _limited_key(k[i], limit, finite)
    dropped = np.empty((1, head_dim), np.float32)
    for j in range(head_dim):
        dropped[0, j] = np.float32(0.0) if is_kept[j] else abs(key[0, j])

    halves = row.view(np.uint16)
    plane_scale = _plane_scale(dropped, head_dim - kept_channels, restore_bits)
    residual = np.empty((1, head_dim), np.float32)
    _fill_plane(key, half_to_float(plane_scale), restore_bits, halves, second_plane, residual)

    kept = np.empty(kept_channels, np.float32)
    largest = np.float32(0.0)
    for n in range(kept_channels):
        kept[n] = residual[0, channels[n]]
        largest = max(largest, abs(kept[n]))
    kept_scale = _half_rounded_up(largest / np.float32(integer_max))
    halves[scales] = plane_scale if finite else _HALF_NAN
    halves[scales + 1] = kept_scale if finite else _HALF_NAN
    # Nothing is left of any kept channel where the scale is 0.
    inverse = np.float32(1.0) / half_to_float(kept_scale) if kept_scale > 0 else np.float32(0.0)
    shift = np.int32(index_bits)
    for n in range(kept_channels):
        integer = np.int32(np.rint(kept[n] * inverse))
        halves[scales + 2 + n] = np.uint16(integer << shift | channels[n])


@kernel(parallel=True)
def _pack(k, norms, norm_of, layout, slots, rows):
    heads = rows.shape[1]
    for work in prange(k.shape[0]):
        token = work // heads
        head = work % heads
        _pack_row(k, work, norms[norm_of[token], head], layout, rows[slots[token], head])


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
    if rows.value_format.is_int4:
        write_int4(v, slots, rows, v_scale)
    else:
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
        norm_of = bounds[:-1]
    else:
        q, bounds = _windows(q, qo_indptr, window)
        norm_of = np.repeat(np.arange(qo_indptr.shape[0] - 1), qo_indptr.diff())
    norms = np.empty((bounds.shape[0] - 1, num_kv_heads, head_dim), np.float32)
    layout = (
        key_format.restore_bits,
        key_format.kept_channels,
        key_format.index_bits,
        key_format.integer_max,
        (key_format.plane_offset + key_format.bit_plane_bytes) // 2,
        key_format.scale_offset // 2,
    )
    call_parallel(_norms, q.float().contiguous().numpy(), bounds, norms)
    call_parallel(
        _pack, k.float().flatten(0, 1).contiguous().numpy(), norms, norm_of, layout, slots.numpy(), keys.numpy()
    )


def _windows(q: torch.Tensor, qo_indptr: torch.Tensor, window: int) -> tuple[torch.Tensor, np.ndarray]:
    """The queries in the requests' windows, and where each request's begin among them."""
    stops = qo_indptr[1:].to(torch.int64)
    lengths = qo_indptr.diff().clamp(max=window)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    tokens = torch.arange(int(bounds[-1])) + (stops - bounds[1:]).repeat_interleave(lengths)
    return q[tokens], bounds.numpy()
