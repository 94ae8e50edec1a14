"""Keys to rows: quantisation of the kept channels over the restore plane of the others.

The arithmetic follows `spark_kernels.reference` operation by operation. Whether a channel is kept, and which side of a
level it is on, are masks and sign bits in integers: LLVM gathers that many outcomes of comparisons into words, and
taking them apart again costs more than the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spark_kernels.gpu.lanes import row_max, row_sum, sum_of_lanes_before
from spark_kernels.gpu.select import select_channels
from spark_kernels.gpu.values import FLOAT16_MAX, HALF_NAN, ROUNDER

_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(-0x80000000)
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def _half_bits(x):
    return x.to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def _half_value(bits):
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _half_rounded_up(x):
    """Bits of the smallest float16 not below a non-negative float32, at most 65504."""
    x = tl.minimum(x, FLOAT16_MAX)
    bits = _half_bits(x)
    return tl.where(_half_value(bits) < x, bits + 1, bits).to(tl.int16)


@triton.jit
def _limited_keys(keys, LIMIT: tl.constexpr, CHANNELS: tl.constexpr):
    """Keys limited to ``LIMIT``, zero in rows with a number that is not finite; and which rows have none, a column."""
    largest = keys[0].to(tl.int32, bitcast=True) & _MAGNITUDE
    for i in tl.static_range(1, CHANNELS):
        # As integers, magnitudes are in order, and NaN is above all.
        largest = tl.maximum(largest, keys[i].to(tl.int32, bitcast=True) & _MAGNITUDE)
    largest = row_max(largest)
    is_finite = largest < _INFINITY
    if tl.max(largest) > tl.full([], LIMIT, tl.float32).to(tl.int32, bitcast=True):
        limited = ()
        for i in tl.static_range(CHANNELS):
            limited = limited + (tl.where(is_finite, tl.minimum(tl.maximum(keys[i], -LIMIT), LIMIT), 0.0),)
        keys = limited
    return keys, is_finite


@triton.jit
def _largest_magnitude(numbers, kept, OF_DROPPED: tl.constexpr, CHANNELS: tl.constexpr):
    """Largest magnitude of the kept or the dropped channels of each row, as a column."""
    largest = tl.zeros_like(kept[0])
    for i in tl.static_range(CHANNELS):
        mask = ~kept[i] if OF_DROPPED else kept[i]
        # As integers, magnitudes are in order.
        largest = tl.maximum(largest, numbers[i].to(tl.int32, bitcast=True) & (mask & _MAGNITUDE))
    return row_max(largest).to(tl.float32, bitcast=True)


@triton.jit
def _mean_dropped(keys, kept, DROPPED: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean magnitude of the ``DROPPED`` channels of each row, as a column.

    One after the other, lane after lane: the order of a sum decides its last bits.
    """
    LANES: tl.constexpr = keys[0].shape[1]
    lanes = tl.arange(0, LANES)[None, :]
    total = tl.zeros_like(keys[0])
    for lane in range(LANES):
        for i in tl.static_range(CHANNELS):
            total += (keys[i].to(tl.int32, bitcast=True) & (~kept[i] & _MAGNITUDE)).to(tl.float32, bitcast=True)
        total = row_sum(tl.where(lanes == lane, total, 0.0)) + tl.zeros_like(total)
    return tl.div_rn(row_max(total), tl.full([total.shape[0], 1], DROPPED, tl.float32))


@triton.jit
def _store_bits(row, plane_offset: tl.constexpr, bits, CHANNELS: tl.constexpr):
    """Store the lanes' bits of one bit plane, which begins ``plane_offset`` bytes into ``row``."""
    piece: tl.constexpr = tl.int16 if CHANNELS == 16 else tl.int8
    lanes = tl.arange(0, bits.shape[1])[None, :]
    tl.store((row + plane_offset).to(tl.pointer_type(piece)) + lanes, bits.to(piece))


@triton.jit
def _restore_plane(keys, plane_scale, row, LAYOUT: tl.constexpr, CHANNELS: tl.constexpr):
    """Store the bit planes; returns what they leave of the keys."""
    half = 0.5 * plane_scale
    quarter = (0.25 * plane_scale).to(tl.int32, bitcast=True)
    residuals = ()
    for i in tl.static_range(CHANNELS):
        magnitude = tl.abs(keys[i])
        level = plane_scale
        if LAYOUT.restore_bits == 2:
            is_small = (magnitude - half).to(tl.int32, bitcast=True) & _SIGN
            level = half + (quarter | is_small).to(tl.float32, bitcast=True)
        residual = (magnitude - level).to(tl.int32, bitcast=True) ^ (keys[i].to(tl.int32, bitcast=True) & _SIGN)
        residuals = residuals + (residual.to(tl.float32, bitcast=True),)

    negative = tl.zeros_like(keys[0]).to(tl.uint32, bitcast=True)
    small = negative
    for i in tl.static_range(CHANNELS - 1, -1, -1):
        negative = (negative << 1) | (keys[i].to(tl.uint32, bitcast=True) >> 31)
        if LAYOUT.restore_bits == 2:
            small = (small << 1) | ((tl.abs(keys[i]) - half).to(tl.uint32, bitcast=True) >> 31)
    negative = negative.to(tl.int32, bitcast=True)
    small = small.to(tl.int32, bitcast=True)
    _store_bits(row, LAYOUT.plane_word * 8, ~negative, CHANNELS)
    if LAYOUT.restore_bits == 2:
        _store_bits(row, LAYOUT.plane_word * 8 + LAYOUT.head_dim // 8, ~(negative ^ small), CHANNELS)
    return residuals


@triton.jit
def store_keys(keys, norms, row, LAYOUT: tl.constexpr, INTEGER_MAX: tl.constexpr, CHANNELS: tl.constexpr):
    """Pack keys into the bytes at ``row``, a column of pointers; keys and norms as `select_channels` takes them."""
    LANES: tl.constexpr = LAYOUT.head_dim // CHANNELS
    halves = row.to(tl.pointer_type(tl.int16))
    kept = select_channels(keys, norms, LAYOUT.kept_channels, CHANNELS)
    keys, is_finite = _limited_keys(keys, FLOAT16_MAX * INTEGER_MAX, CHANNELS)

    residuals = keys
    plane_bits = tl.zeros([row.shape[0], 1], tl.int16)
    if LAYOUT.restore_bits > 0:
        if LAYOUT.restore_bits == 2:
            plane_scale = _largest_magnitude(keys, kept, True, CHANNELS)
        else:
            plane_scale = _mean_dropped(keys, kept, LAYOUT.head_dim - LAYOUT.kept_channels, CHANNELS)
        plane_bits = _half_bits(tl.minimum(plane_scale, FLOAT16_MAX))
        residuals = _restore_plane(keys, _half_value(plane_bits), row, LAYOUT, CHANNELS)

    largest = _largest_magnitude(residuals, kept, False, CHANNELS)
    kept_bits = _half_rounded_up(tl.div_rn(largest, tl.full(largest.shape, INTEGER_MAX, tl.float32)))
    kept_scale = _half_value(kept_bits)
    # Nothing is left of any kept channel where the scale is 0.
    inverse = tl.div_rn(tl.full(largest.shape, 1.0, tl.float32), tl.where(kept_scale > 0, kept_scale, 1.0))
    tl.store(halves + LAYOUT.scale_half, tl.where(is_finite, plane_bits, HALF_NAN).to(tl.int16))
    tl.store(halves + LAYOUT.scale_half + 1, tl.where(is_finite, kept_bits, HALF_NAN).to(tl.int16))

    count = -kept[0]
    for i in tl.static_range(1, CHANNELS):
        count -= kept[i]
    position = LAYOUT.kept_half + sum_of_lanes_before(count)
    first_channel = CHANNELS * tl.arange(0, LANES)[None, :]
    for i in tl.static_range(CHANNELS):
        # The low bits of the sum are the rounded integer's.
        integer = (residuals[i] * inverse + ROUNDER).to(tl.int32, bitcast=True)
        word = (integer << LAYOUT.index_bits) | (first_channel + i)
        tl.store(halves + position, word.to(tl.int16), mask=kept[i] < 0)
        position -= kept[i]
