"""Keys and values to rows.

The arithmetic follows `spark_kernels.reference` operation by operation, so no function here may be compiled with
reordered sums of floats or fused multiplications.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from spark_kernels.cpu import memory, vectors
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.fields import key_layout, value_layout
from spark_kernels.cpu.hadamard import transform
from spark_kernels.cpu.numbers import bits_to_float, float_to_half, half_to_float
from spark_kernels.cpu.threads import call_parallel
from spark_kernels.cpu.vector_types import LANES
from spark_kernels.formats import UNIT_STEPS, Numbers
from spark_kernels.reference import (
    CLIP,
    KEY_SQUARE_ONE,
    LARGEST_SCALE,
    LEAST_REACH,
    LEAST_TAU,
    VALUE_PRODUCT_ONE,
    VALUE_SQUARE_ONE,
    encode_values,
    hadamard_scales,
)
from spark_kernels.rows import LayerRows

_FLOAT32_MAX = np.float32(torch.finfo(torch.float32).max)
_FLOAT16_MAX = np.float32(torch.finfo(torch.float16).max)
_HALF_NAN = np.uint16(0x7E00)
_MAGNITUDE, _INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_CLIP, _LEAST_TAU, _LEAST_REACH = np.float32(CLIP), np.float32(LEAST_TAU), np.float32(LEAST_REACH)
_LARGEST_SCALE = np.float32(LARGEST_SCALE)
_KEY_ONE, _SQUARE_ONE = np.float32(KEY_SQUARE_ONE), np.float32(VALUE_SQUARE_ONE)
_PRODUCT_ONE, _TWO_PRODUCTS = np.float32(VALUE_PRODUCT_ONE), np.float32(2.0 / VALUE_PRODUCT_ONE)
_ZERO, _HALF, _ONE, _TWO = np.float32(0.0), np.float32(0.5), np.float32(1.0), np.float32(2.0)


@kernel()
def _limited(x):
    """A non-negative number, or the largest one for infinity and NaN."""
    return x if x <= _FLOAT32_MAX else _FLOAT32_MAX


@kernel(parallel=True)
def _query_squares(q, bounds, squares):
    """Sums over the queries ``q[bounds[r] : bounds[r + 1]]`` of each request r and over the group."""
    heads = squares.shape[1]
    group = q.shape[1] // heads
    for work in prange((bounds.shape[0] - 1) * heads):
        request = work // heads
        head = work % heads
        total = squares[request, head]
        total[:] = _ZERO
        for token in range(bounds[request], bounds[request + 1]):
            for member in range(head * group, (head + 1) * group):
                for j in range(q.shape[2]):
                    total[j] += q[token, member, j] * q[token, member, j]


@kernel()
def _largest_magnitude(x):
    """Bits of the largest magnitude in ``x``; those of infinity or above where a number is not finite."""
    # As integers, magnitudes are in order and NaN is above all: such loops vectorise.
    bits = x.view(np.uint32)
    largest = np.uint32(0)
    for j in range(bits.shape[0]):
        largest = max(largest, bits[j] & _MAGNITUDE)
    return largest


@kernel()
def _pack_planes(planes, codes, row):
    """Write the planes of int32 ``codes`` into the bytes of a row."""
    for i in range(planes.shape[0]):
        bits, start, first, count, shift = planes[i]
        mask = (1 << bits) - 1
        for j in range(count):
            byte = 0
            for place in range(8 // bits):
                byte |= (codes[start + place] >> shift & mask) << (place * bits)
            row[first + j] = byte
            start += 8 // bits


@kernel()
def _centred_key(k, layout, head, x):
    """By position, what a key is beyond its centre; whether the key is finite. One that is not counts as zeros."""
    order, centre = layout.order, layout.centre
    finite = _largest_magnitude(k) < _INFINITY
    limit = _FLOAT16_MAX * np.float32((1 << layout.magnitude_bits) - 1)
    for position in range(x.shape[0]):
        number = min(max(k[order[head, position]], -limit), limit) if finite else _ZERO
        x[position] = number - centre[head, position]
    return finite


@kernel()
def _tau(x, layout, head):
    """float16 bits of the scale of a key's restoration."""
    inverse_step = layout.inverse_step
    count = layout.restored_channels
    if count == 0:
        return np.uint16(0)
    total = np.int32(0)
    for position in range(count):
        normalised = x[position] * inverse_step[head, position]
        total += np.int32(min(normalised * normalised, _CLIP) * _KEY_ONE)
    mean = np.float32(total) * np.float32(1.0 / (count * KEY_SQUARE_ONE))
    return float_to_half(max(np.sqrt(mean), _LEAST_TAU))


@kernel()
def _quantise(x, layout, head, tau, codes):
    """Codes of a key, of which ``x`` then has what they leave."""
    unit, inverse_unit = layout.unit, layout.inverse_unit
    middles = layout.middles
    inverse = _ONE / tau if tau > 0 else _ZERO
    for position in range(x.shape[0]):
        half = _HALF - middles[position] if middles[position] < 0 else _ZERO
        level = np.floor(x[position] * inverse_unit[head, position] * inverse)
        level = min(max(level, -half), half - _ONE) if half > 0 else _ZERO
        codes[position] = np.int32(level + half)
        x[position] -= (np.float32(codes[position]) + middles[position]) * (unit[head, position] * tau)


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
def _select(scores, wanted, kept):
    """The positions of the ``wanted`` largest ``scores``, ascending, to ``kept``, which has room for one more."""
    threshold, reaching = _threshold(scores, wanted)
    # Of those equal to the threshold the last go, down to the position that leaves as many as wanted.
    last = scores.shape[1] - 1
    while reaching > wanted:
        reaching -= scores[0, last] == threshold
        last -= 1
    # Without a branch: which channels are kept is not predictable.
    n = np.uint64(0)
    for position in range(scores.shape[1]):
        kept[n] = position
        n += np.uint64(scores[0, position] > threshold or (scores[0, position] == threshold and position <= last))


@kernel()
def _half_rounded_up(x):
    x = min(x, _FLOAT16_MAX)
    half = float_to_half(x)
    return np.uint16(half + 1) if half_to_float(half) < x else half


@kernel()
def _pack_kept(x, kept, layout, words):
    """Write kappa and the kept words of what restoration leaves of a key."""
    largest = _ZERO
    for n in range(layout.end - layout.kept):
        largest = max(largest, abs(x[kept[n]]))
    kappa = _half_rounded_up(largest / np.float32((1 << layout.magnitude_bits) - 1))
    words[layout.scales + 1] = kappa
    # Nothing is left of any kept channel where kappa is 0.
    inverse = _ONE / half_to_float(kappa) if kappa > 0 else _ZERO
    for n in range(layout.end - layout.kept):
        integer = np.int32(np.rint(x[kept[n]] * inverse))
        place = kept[n] | (1 << layout.position_bits if integer < 0 else 0)
        words[layout.kept + n] = np.uint16(place << layout.magnitude_bits | abs(integer))


@kernel()
def _pack_key(k, squares, layout, head, row):
    """Write the row of one key, ``[head_dim]`` like ``squares``."""
    words = row.view(np.uint16)
    order = layout.order
    head_dim = k.shape[0]
    x, codes = np.empty(head_dim, np.float32), np.empty(head_dim, np.int32)
    finite = _centred_key(k, layout, head, x)
    tau = _tau(x, layout, head)
    _quantise(x, layout, head, half_to_float(tau), codes)
    scores = np.empty((1, head_dim), np.float32)
    for position in range(head_dim):
        scores[0, position] = _limited(x[position] * x[position] * _limited(squares[order[head, position]]))
    kept = np.empty(layout.end - layout.kept + 1, np.int32)
    _select(scores, layout.end - layout.kept, kept)
    _pack_planes(layout.planes, codes, row)
    _pack_kept(x, kept, layout, words)
    words[layout.scales] = tau
    if not finite:
        words[layout.scales : layout.kept] = _HALF_NAN
    words[layout.end :] = 0


@kernel(parallel=True)
def _pack_keys(k, squares, squares_of, layout, slots, rows):
    heads = rows.shape[1]
    for work in prange(k.shape[0]):
        token, head = work // heads, work % heads
        _pack_key(k[work], squares[squares_of[token], head], layout, head, rows[slots[token], head])


# A check for zero divisors would keep loops from vectorising.
@kernel(error_model="numpy")
def _first_scale(y, half, unit_step, largest):
    """Halfway between what suits the deviation of ``y`` and what reaches its largest number, not above the latter."""
    reach = largest * (_ONE / half)
    if reach < _LEAST_REACH:
        return _ZERO
    top = reach * half
    inverse = _ONE / top
    total = np.int32(0)
    for j in range(y.shape[0]):
        share = y[j] * inverse
        total += np.int32(share * share * _SQUARE_ONE)
    mean = np.float32(total) * np.float32(1.0 / (y.shape[0] * VALUE_SQUARE_ONE))
    return min(reach, _HALF * (np.sqrt(mean) * top * unit_step + reach))


@kernel(error_model="numpy")
def _fitted_scale(y, half, scale):
    """The scale with the least squared error for the codes that ``scale`` gives."""
    inverse = _ONE / scale if scale > 0 else _ZERO
    product, square = np.int32(0), np.int32(0)
    for j in range(y.shape[0]):
        level = y[j] * inverse
        odd = _TWO * min(max(np.floor(level), -half), half - _ONE) + _ONE
        product += np.int32(level * odd * _PRODUCT_ONE)
        square += np.int32(odd) * np.int32(odd)
    fitted = scale * (np.float32(product) / np.float32(square)) * _TWO_PRODUCTS
    return float_to_half(min(fitted, _LARGEST_SCALE))


@kernel(error_model="numpy")
def _pack_value(tile, layout, forward, unit_step, row):
    """Write the row of one value, ``[1, head_dim]``, which is changed."""
    words = row.view(np.uint16)
    y = tile[0]
    half = np.float32(1 << (layout.bits - 1))
    is_nan = _largest_magnitude(y) > _INFINITY
    for j in range(y.shape[0]):
        y[j] = _ZERO if is_nan else min(max(y[j], -_FLOAT16_MAX), _FLOAT16_MAX)
    transform(tile, 0, layout.block)
    for j in range(y.shape[0]):
        y[j] *= forward
    scale = _fitted_scale(y, half, _first_scale(y, half, unit_step, bits_to_float(_largest_magnitude(y))))
    inverse = _ONE / half_to_float(scale) if scale > 0 else _ZERO
    codes = np.empty(y.shape[0], np.int32)
    for j in range(y.shape[0]):
        codes[j] = np.int32(min(max(np.floor(y[j] * inverse), -half), half - _ONE) + half)
    _pack_planes(layout.planes, codes, row)
    words[layout.scale] = _HALF_NAN if is_nan else scale
    words[layout.scale + 1 :] = 0


@kernel(parallel=True)
def _pack_values(v, layout, forward, unit_step, slots, rows):
    heads = rows.shape[1]
    for work in prange(v.shape[0]):
        row = rows[slots[work // heads], work % heads]
        _pack_value(v[work : work + 1], layout, forward, unit_step, row)


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
    if isinstance(rows.key_format, Numbers):
        _store(k.to(rows.key_format.dtype), slots, rows.keys)
    else:
        _write_keys(q, k, slots, rows, qo_indptr, window)
    if isinstance(rows.value_format, Numbers):
        _store(encode_values(v, rows.value_format, v_scale), slots, rows.values)
    else:
        _write_values(v, slots, rows, v_scale)


def _store(numbers: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy dense numbers ``[n, num_kv_heads, head_dim]`` to rows of as many bytes."""
    # Rows are multiples of 8 bytes; whole words copy fastest.
    rows.view(torch.int64)[slots] = numbers.contiguous().view(torch.int64)


def _write_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    slots: torch.Tensor,
    rows: LayerRows,
    qo_indptr: torch.Tensor | None,
    window: int,
) -> None:
    num_tokens, num_kv_heads, head_dim = k.shape
    if qo_indptr is None:
        bounds = np.arange(num_tokens + 1)
        squares_of = bounds[:-1]
    else:
        q, bounds = _windows(q, qo_indptr, window)
        squares_of = np.repeat(np.arange(qo_indptr.shape[0] - 1), qo_indptr.diff())
    squares = np.empty((bounds.shape[0] - 1, num_kv_heads, head_dim), np.float32)
    call_parallel(_query_squares, q.float().contiguous().numpy(), bounds, squares)
    keys = k.float().flatten(0, 1).contiguous().numpy()
    call_parallel(_pack_keys, keys, squares, squares_of, key_layout(rows), slots.numpy(), rows.arrays[0])


def _write_values(v: torch.Tensor, slots: torch.Tensor, rows: LayerRows, v_scale: float) -> None:
    made = rows.value_format
    # A copy in any case: it is transformed in place.
    v = v.to(torch.float32, copy=True) if v_scale == 1.0 else v.float() / v_scale
    call_parallel(
        _pack_values,
        v.flatten(0, 1).contiguous().numpy(),
        value_layout(made),
        np.float32(hadamard_scales(made.block)[0]),
        np.float32(UNIT_STEPS[made.bits]),
        slots.numpy(),
        rows.arrays[1],
    )


def _windows(q: torch.Tensor, qo_indptr: torch.Tensor, window: int) -> tuple[torch.Tensor, np.ndarray]:
    """The queries in the requests' windows, and where each request's begin among them."""
    stops = qo_indptr[1:].to(torch.int64)
    lengths = qo_indptr.diff().clamp(max=window)
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    tokens = torch.arange(int(bounds[-1])) + (stops - bounds[1:]).repeat_interleave(lengths)
    return q[tokens], bounds.numpy()
