"""Sums of cached values under softmax weights, without a dense copy of the values."""

from __future__ import annotations

import numpy as np

from spark_kernels.cpu import memory, vectors
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.fields import BFLOAT16, CODES, FLOAT8, FLOAT16
from spark_kernels.cpu.numbers import half_to_float
from spark_kernels.cpu.restore import number_vector
from spark_kernels.cpu.scores import QUAD
from spark_kernels.cpu.vector_types import LANES


@kernel()
def weighted_sum(layout, rows, slots, head, weights, out):
    """Sums of the values at ``slots`` under ``weights[m // 4, 4 * n + m % 4]``, one row of ``out`` per query m.

    Values of integers stay transformed, and ``weights`` are changed.
    """
    if layout.code == CODES:
        _sum_integers(layout, rows, slots, head, weights, out)
    elif layout.code == BFLOAT16:
        _sum_numbers(rows.view(np.uint16), slots, head, weights, out)
    elif layout.code == FLOAT16:
        _sum_numbers(rows.view(np.int16), slots, head, weights, out)
    elif layout.code == FLOAT8:
        _sum_numbers(rows, slots, head, weights, out)
    else:
        _sum_numbers(rows.view(np.float32), slots, head, weights, out)


@kernel()
def _sum_numbers(numbers, slots, head, weights, out):
    """Four queries and 32 channels at a time.

    Where channels or queries are not a multiple of that, the last are computed more than once, to the same result.
    """
    for quad in range(weights.shape[0]):
        for j in range(0, out.shape[1], 2 * LANES):
            next_j = min(j + LANES, out.shape[1] - LANES)
            a0, a1, a2, a3, b0, b1, b2, b3 = _zeros()
            for n in range(slots.shape[0]):
                a = number_vector(numbers, slots[n], head, j)
                b = number_vector(numbers, slots[n], head, next_j)
                w0, w1, w2, w3 = _four(weights, quad, n)
                a0, a1 = vectors.multiply_add(w0, a, a0), vectors.multiply_add(w1, a, a1)
                a2, a3 = vectors.multiply_add(w2, a, a2), vectors.multiply_add(w3, a, a3)
                b0, b1 = vectors.multiply_add(w0, b, b0), vectors.multiply_add(w1, b, b1)
                b2, b3 = vectors.multiply_add(w2, b, b2), vectors.multiply_add(w3, b, b3)
            _store(out, QUAD * quad, j, a0, a1, a2, a3)
            _store(out, QUAD * quad, next_j, b0, b1, b2, b3)


@kernel()
def _sum_integers(layout, rows, slots, head, weights, out):
    """Four queries and a pair of fields at a time; the sums of codes then come from their lanes to their channels."""
    halves = rows.view(np.uint16)
    pairs = layout.pairs
    middle = layout.middles[0]
    sums = memory.empty_tile(QUAD, layout.positions.size)
    for quad in range(weights.shape[0]):
        m0, m1, m2, m3 = _scale_weights(halves, slots, head, layout.scale, weights, quad)
        for i in range(pairs.shape[0]):
            first, shift, bits = np.intp(pairs[i, 0]), pairs[i, 1], pairs[i, 2]
            a0, a1, a2, a3, b0, b1, b2, b3 = _zeros()
            for n in range(slots.shape[0]):
                slot = memory.at(slots, n)
                a = memory.load_codes(rows, slot, head, first, shift, bits)
                b = memory.load_codes(rows, slot, head, first, shift + bits, bits)
                w0, w1, w2, w3 = _four(weights, quad, n)
                a0, a1 = vectors.multiply_add(w0, a, a0), vectors.multiply_add(w1, a, a1)
                a2, a3 = vectors.multiply_add(w2, a, a2), vectors.multiply_add(w3, a, a3)
                b0, b1 = vectors.multiply_add(w0, b, b0), vectors.multiply_add(w1, b, b1)
                b2, b3 = vectors.multiply_add(w2, b, b2), vectors.multiply_add(w3, b, b3)
            _store(sums, 0, 2 * LANES * i, a0, a1, a2, a3)
            _store(sums, 0, 2 * LANES * i + LANES, b0, b1, b2, b3)
        totals = (m0 * middle, m1 * middle, m2 * middle, m3 * middle)
        for lane in range(QUAD):
            _to_channels(layout, sums[lane], totals[lane], out[QUAD * quad + lane])


@kernel()
def _scale_weights(halves, slots, head, scale_word, weights, quad):
    """Multiply four queries' weights by the tokens' scales; their sums."""
    m0 = m1 = m2 = m3 = np.float32(0.0)
    for n in range(slots.shape[0]):
        scale = half_to_float(halves[slots[n], head, scale_word])
        weights[quad, QUAD * n] *= scale
        weights[quad, QUAD * n + 1] *= scale
        weights[quad, QUAD * n + 2] *= scale
        weights[quad, QUAD * n + 3] *= scale
        m0 += weights[quad, QUAD * n]
        m1 += weights[quad, QUAD * n + 1]
        m2 += weights[quad, QUAD * n + 2]
        m3 += weights[quad, QUAD * n + 3]
    return m0, m1, m2, m3


@kernel()
def _to_channels(layout, sums, total, out):
    planes = layout.planes
    for channel in range(out.shape[0]):
        x = total
        for plane in range(planes.shape[0]):
            x += sums[layout.lanes[plane, channel]] * np.float32(1 << planes[plane, 4])
        out[channel] = x


@kernel(forceinline=True)
def _zeros():
    zero = vectors.splat(np.float32(0.0))
    return zero, zero, zero, zero, zero, zero, zero, zero


@kernel(forceinline=True)
def _four(weights, quad, n):
    return (
        vectors.splat(weights[quad, QUAD * n]),
        vectors.splat(weights[quad, QUAD * n + 1]),
        vectors.splat(weights[quad, QUAD * n + 2]),
        vectors.splat(weights[quad, QUAD * n + 3]),
    )


@kernel(forceinline=True)
def _store(out, m, j, a0, a1, a2, a3):
    memory.store(out, m, j, a0)
    memory.store(out, m + 1, j, a1)
    memory.store(out, m + 2, j, a2)
    memory.store(out, m + 3, j, a3)
