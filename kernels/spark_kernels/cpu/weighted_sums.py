"""Sums of cached values under softmax weights, without a dense copy of the values."""

from __future__ import annotations

import numpy as np

from spark_kernels.cpu import memory, vectors
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.rows import BFLOAT16, FLOAT8, FLOAT16, INT4, number_vector
from spark_kernels.cpu.scores import QUAD
from spark_kernels.cpu.values import load_int4
from spark_kernels.cpu.vector_types import LANES
from spark_kernels.formats import INT4_GROUPS


@kernel()
def weighted_sum(code, rows, slots, head, weights, out):
    """Sums of the values at ``slots`` under ``weights[m // 4, 4 * n + m % 4]``, one row of ``out`` per query m."""
    if code >= INT4 and (out.shape[1] // INT4_GROUPS) % LANES == 0:
        _weighted_sum(rows.view(np.int8), slots, head, weights, out)
    elif code >= INT4:
        values = np.empty((slots.shape[0], 1, out.shape[1]), np.float32)
        load_int4(code - INT4, rows, slots, 0, slots.shape[0], head, values[:, 0], 0)
        _weighted_sum(values, np.arange(slots.shape[0]), 0, weights, out)
    elif code == BFLOAT16:
        _weighted_sum(rows.view(np.uint16), slots, head, weights, out)
    elif code == FLOAT16:
        _weighted_sum(rows.view(np.int16), slots, head, weights, out)
    elif code == FLOAT8:
        _weighted_sum(rows, slots, head, weights, out)
    else:
        _weighted_sum(rows.view(np.float32), slots, head, weights, out)


@kernel()
def _weighted_sum(numbers, slots, head, weights, out):
    """The weighted sums of the chunk's values, of four queries and 32 channels at a time.

    Where channels or queries are not a multiple of that, the last are computed more than once, to the same result.
    """
    zero = vectors.splat(np.float32(0.0))
    for quad in range(weights.shape[0]):
        m = QUAD * quad
        for j in range(0, out.shape[1], 2 * LANES):
            next_j = min(j + LANES, out.shape[1] - LANES)
            a0, a1, a2, a3 = zero, zero, zero, zero
            b0, b1, b2, b3 = zero, zero, zero, zero
            for n in range(slots.shape[0]):
                a = number_vector(numbers, slots[n], head, j)
                b = number_vector(numbers, slots[n], head, next_j)
                weight = vectors.splat(weights[quad, QUAD * n])
                a0, b0 = vectors.multiply_add(weight, a, a0), vectors.multiply_add(weight, b, b0)
                weight = vectors.splat(weights[quad, QUAD * n + 1])
                a1, b1 = vectors.multiply_add(weight, a, a1), vectors.multiply_add(weight, b, b1)
                weight = vectors.splat(weights[quad, QUAD * n + 2])
                a2, b2 = vectors.multiply_add(weight, a, a2), vectors.multiply_add(weight, b, b2)
                weight = vectors.splat(weights[quad, QUAD * n + 3])
                a3, b3 = vectors.multiply_add(weight, a, a3), vectors.multiply_add(weight, b, b3)
            memory.store(out, m, j, a0)
            memory.store(out, m + 1, j, a1)
            memory.store(out, m + 2, j, a2)
            memory.store(out, m + 3, j, a3)
            memory.store(out, m, next_j, b0)
            memory.store(out, m + 1, next_j, b1)
            memory.store(out, m + 2, next_j, b2)
            memory.store(out, m + 3, next_j, b3)
