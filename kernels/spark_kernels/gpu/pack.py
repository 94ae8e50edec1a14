"""Keys to rows: codes of what is beyond the centre, and integers of what codes leave of the kept channels.

The arithmetic follows `spark_kernels.reference` operation by operation. Whether a channel is kept is a mask in
integers: LLVM gathers many outcomes of comparisons into words, and taking them apart again costs more than the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_kernels.gpu.lanes import gather_channels, load_channels, row_max, row_sum, sum_of_lanes_before
from spark_kernels.gpu.select import select_channels
from spark_kernels.reference import CLIP, KEY_SQUARE_ONE, LEAST_TAU

FLOAT16_MAX = tl.constexpr(torch.finfo(torch.float16).max)
FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)
HALF_NAN = tl.constexpr(0x7E00)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
# 1.5 * 2**23: to add it rounds a float32 to the nearest integer, ties to even, in the low bits of the sum.
ROUNDER = tl.constexpr(12582912.0)
_ROUNDER_MANTISSA = tl.constexpr(0x400000)
_CLIP = tl.constexpr(CLIP)
_LEAST_TAU = tl.constexpr(LEAST_TAU)
_SQUARE_ONE = tl.constexpr(KEY_SQUARE_ONE)


@triton.jit
def finite(x):
    """A non-negative number, or the largest one for infinity and NaN."""
    return tl.where(x < FLOAT32_MAX, x, FLOAT32_MAX)


@triton.jit
def half_bits(x):
    return x.to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def half_value(bits):
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def inverse_of(x):
    """One over a column of numbers, 0 where they are not positive."""
    return tl.where(x > 0, tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.where(x > 0, x, 1.0)), 0.0)


@triton.jit
def _half_rounded_up(x):
    """Bits of the smallest float16 not below a non-negative float32, at most 65504."""
    x = tl.minimum(x, FLOAT16_MAX)
    bits = half_bits(x)
    return tl.where(half_value(bits) < x, bits + 1, bits).to(tl.int16)


@triton.jit
def largest_magnitude(numbers, COUNT: tl.constexpr):
    """Bits of the largest magnitude of each row, as a column. As integers they are in order, and NaN is above all."""
    largest = numbers[0].to(tl.int32, bitcast=True) & MAGNITUDE
    for i in tl.static_range(1, COUNT):
        largest = tl.maximum(largest, numbers[i].to(tl.int32, bitcast=True) & MAGNITUDE)
    return row_max(largest)


@triton.jit
def _largest_kept(numbers, kept, CHANNELS: tl.constexpr):
    """Largest magnitude of the kept channels of each row, as a column."""
    largest = tl.zeros_like(kept[0])
    for i in tl.static_range(CHANNELS):
        largest = tl.maximum(largest, numbers[i].to(tl.int32, bitcast=True) & (kept[i] & MAGNITUDE))
    return row_max(largest).to(tl.float32, bitcast=True)


@triton.jit
def _centred(keys, centres, LIMIT: tl.constexpr, CHANNELS: tl.constexpr):
    """Keys beyond their centres, those of zeros in rows with a number that is not finite; which rows have none."""
    largest = largest_magnitude(keys, CHANNELS)
    is_finite = largest < INFINITY
    if tl.max(largest) > tl.full([], LIMIT, tl.float32).to(tl.int32, bitcast=True):
        limited = ()
        for i in tl.static_range(CHANNELS):
            limited = limited + (tl.where(is_finite, tl.minimum(tl.maximum(keys[i], -LIMIT), LIMIT), 0.0),)
        keys = limited
    x = ()
    for i in tl.static_range(CHANNELS):
        x = x + (keys[i] - centres[i],)
    return x, is_finite


@triton.jit
def _tau_bits(x, inverse_steps, positions, LAYOUT: tl.constexpr, CHANNELS: tl.constexpr):
    """float16 bits of the scale of restoration, a column."""
    RESTORED: tl.constexpr = LAYOUT.count_4 + LAYOUT.count_2 + LAYOUT.count_1
    total = tl.zeros_like(positions)
    for i in tl.static_range(CHANNELS):
        normalised = x[i] * inverse_steps[i]
        square = (tl.minimum(normalised * normalised, _CLIP) * _SQUARE_ONE).to(tl.int32)
        total += square if RESTORED == LAYOUT.head_dim else tl.where(positions + i < RESTORED, square, 0)
    mean = row_sum(total).to(tl.float32) * (1.0 / (RESTORED * _SQUARE_ONE))
    return half_bits(tl.maximum(tl.sqrt_rn(mean), _LEAST_TAU))


@triton.jit
def _store_planes(row, codes, group, LAYOUT: tl.constexpr):
    """Store eight neighbouring codes of a lane, the lane's ``group`` of eight in its row."""
    FOURS: tl.constexpr = LAYOUT.count_4 // 8
    TWOS: tl.constexpr = LAYOUT.count_2 // 8
    ONES: tl.constexpr = LAYOUT.count_1 // 8
    bits = tl.where(group < FOURS, 4, tl.where(group < FOURS + TWOS, 2, 1))
    word = codes[7]
    for i in tl.static_range(6, -1, -1):
        word = (word << bits) | codes[i]
    if FOURS:
        is_four = group < FOURS
        tl.store(row.to(tl.pointer_type(tl.int32)) + group, word, mask=is_four)
    if TWOS:
        is_two = (group >= FOURS) & (group < FOURS + TWOS)
        halves = (row + LAYOUT.first_2).to(tl.pointer_type(tl.int16))
        tl.store(halves + (group - FOURS), word.to(tl.int16), mask=is_two)
    if ONES:
        is_one = (group >= FOURS + TWOS) & (group < FOURS + TWOS + ONES)
        tl.store(row + LAYOUT.first_1 + (group - FOURS - TWOS), word.to(tl.uint8), mask=is_one)


@triton.jit
def _quantise(x, tau, units, inverse_units, positions, row, LAYOUT: tl.constexpr, CHANNELS: tl.constexpr):
    """Store the planes; returns what they leave of ``x``."""
    inverse = inverse_of(tau)
    residuals = ()
    for group in tl.static_range(CHANNELS // 8):
        # Eight neighbours have one width.
        first = positions + 8 * group
        half = tl.where(first < LAYOUT.count_4, 8.0, tl.where(first < LAYOUT.count_4 + LAYOUT.count_2, 2.0, 1.0))
        least = -half
        most = half - 1.0
        codes = ()
        for i in tl.static_range(8 * group, 8 * group + 8):
            level = tl.minimum(tl.maximum(tl.floor(x[i] * inverse_units[i] * inverse), least), most)
            # Without bits the unit is 0, and nothing is taken off.
            residuals = residuals + (x[i] - (level + 0.5) * (units[i] * tau),)
            codes = codes + ((level + half).to(tl.int32),)
        _store_planes(row, codes, first // 8, LAYOUT)
    return residuals


@triton.jit
def _store_kept(residuals, kept, kappa, positions, halves, LAYOUT: tl.constexpr, CHANNELS: tl.constexpr):
    """Store the kept words, in ascending order of position."""
    inverse = inverse_of(kappa)
    count = -kept[0]
    for i in tl.static_range(1, CHANNELS):
        count -= kept[i]
    place = LAYOUT.kept_half + sum_of_lanes_before(count)
    for i in tl.static_range(CHANNELS):
        rounded = (residuals[i] * inverse + ROUNDER).to(tl.int32, bitcast=True)
        integer = (rounded & 0x7FFFFF) - _ROUNDER_MANTISSA
        signed_position = (positions + i) | ((integer < 0).to(tl.int32) << LAYOUT.position_bits)
        word = (signed_position << LAYOUT.magnitude_bits) | tl.abs(integer)
        tl.store(halves + place, word.to(tl.int16), mask=kept[i] < 0)
        place -= kept[i]


@triton.jit
def store_keys(k_ptr, squares, tables, head, row, LAYOUT: tl.constexpr, CHANNELS: tl.constexpr):
    """Pack the keys at ``k_ptr`` into the bytes at ``row``, columns of pointers.

    ``squares`` are the query squares of a lane's positions, finite; ``tables`` are pointers to the
    layer's order, centre, inverse step, unit and inverse unit.
    """
    LANES: tl.constexpr = LAYOUT.head_dim // CHANNELS
    MAX: tl.constexpr = (1 << LAYOUT.magnitude_bits) - 1
    order, centre, inverse_step, unit, inverse_unit = tables
    positions = CHANNELS * tl.arange(0, LANES)[None, :]
    at = head * LAYOUT.head_dim + positions
    keys = gather_channels(k_ptr, load_channels(order + at, CHANNELS), CHANNELS)
    x, is_finite = _centred(keys, load_channels(centre + at, CHANNELS), FLOAT16_MAX * MAX, CHANNELS)
    # One position number per row and lane.
    positions += tl.zeros_like(x[0]).to(tl.int32)

    if LAYOUT.count_4 + LAYOUT.count_2 + LAYOUT.count_1 > 0:
        tau_bits = _tau_bits(x, load_channels(inverse_step + at, CHANNELS), positions, LAYOUT, CHANNELS)
        units, inverse_units = load_channels(unit + at, CHANNELS), load_channels(inverse_unit + at, CHANNELS)
        x = _quantise(x, half_value(tau_bits), units, inverse_units, positions, row, LAYOUT, CHANNELS)
    else:
        tau_bits = tl.zeros_like(is_finite).to(tl.int16)

    scores = ()
    for i in tl.static_range(CHANNELS):
        scores = scores + (finite(x[i] * x[i] * squares[i]).to(tl.int32, bitcast=True),)
    kept = select_channels(scores, LAYOUT.kept_channels, CHANNELS)
    largest = _largest_kept(x, kept, CHANNELS)
    kappa_bits = _half_rounded_up(tl.div_rn(largest, tl.full(largest.shape, MAX, tl.float32)))
    halves = row.to(tl.pointer_type(tl.int16))
    _store_kept(x, kept, half_value(kappa_bits), positions, halves, LAYOUT, CHANNELS)
    tl.store(halves + LAYOUT.scale_half, tl.where(is_finite, tau_bits, HALF_NAN).to(tl.int16))
    tl.store(halves + LAYOUT.scale_half + 1, tl.where(is_finite, kappa_bits, HALF_NAN).to(tl.int16))
    FIRST: tl.constexpr = LAYOUT.kept_half + LAYOUT.kept_channels
    LAST: tl.constexpr = LAYOUT.row_bytes // 2
    for i in tl.static_range(FIRST, LAST):
        tl.store(halves + i, tl.zeros_like(kappa_bits))
