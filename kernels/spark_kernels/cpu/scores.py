"""Products of queries with cached keys, without a dense copy of the keys.

Queries are taken four at a time. A pruned key's product with a query q is

    q . centre + tau * sum((code + middle) * unit * q) + kappa * sum(integer * q)

with the last sum over its kept channels. Codes are unpacked in registers, 16 at a time, against queries that have been
multiplied by the units and brought into the order of the codes; each kept channel fetches its entry of all four queries
from a table at once.
"""

from __future__ import annotations

import numpy as np

from spark_kernels.cpu import memory, vectors
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.fields import BFLOAT16, CODES, FLOAT16
from spark_kernels.cpu.numbers import half_to_float
from spark_kernels.cpu.restore import number_vector
from spark_kernels.cpu.vector_types import LANES

# Queries computed together; where a group is not a multiple, its last query is computed again.
QUAD = 4
_CACHE_LINE = 64
# Tokens between the request for a key row and its use.
_AHEAD = 32


@kernel()
def score_keys(layout, rows, slots, head, q, scores, value_rows):
    """Products of the group's queries with the keys at ``slots``: ``scores[m // 4, 4 * n + m % 4]``.

    Meanwhile it has the CPU fetch the tokens' value rows, which are read next.
    """
    if layout.code == CODES:
        _score_pruned(layout, rows, slots, head, q, scores, value_rows)
    elif layout.code == BFLOAT16:
        _score_numbers(rows.view(np.uint16), slots, head, q, scores, value_rows)
    elif layout.code == FLOAT16:
        _score_numbers(rows.view(np.int16), slots, head, q, scores, value_rows)
    else:
        _score_numbers(rows.view(np.float32), slots, head, q, scores, value_rows)


@kernel(forceinline=True)
def _prefetch(rows, slots, n, head):
    """Ask for token ``n``'s row: slots are scattered, so the CPU cannot foresee them."""
    slot = memory.at(slots, min(n, slots.shape[0] - 1))
    for i in range(0, rows.shape[2], _CACHE_LINE // rows.itemsize):
        memory.prefetch(rows, slot, head, i)
    # Rows need not begin with a cache line, so they may reach into one more.
    memory.prefetch(rows, slot, head, rows.shape[2] - 1)


@kernel()
def _score_numbers(numbers, slots, head, q, scores, value_rows):
    zero = vectors.splat(np.float32(0.0))
    last = q.shape[0] - 1
    for quad in range(scores.shape[0]):
        m0 = QUAD * quad
        m1, m2, m3 = min(m0 + 1, last), min(m0 + 2, last), min(m0 + 3, last)
        for n in range(slots.shape[0]):
            _prefetch(numbers, slots, n + _AHEAD, head)
            _prefetch(value_rows, slots, n, head)
            a0, a1, a2, a3 = zero, zero, zero, zero
            for j in range(0, q.shape[1], LANES):
                key = number_vector(numbers, slots[n], head, j)
                a0 = vectors.multiply_add(key, memory.load(q, m0, j), a0)
                a1 = vectors.multiply_add(key, memory.load(q, m1, j), a1)
                a2 = vectors.multiply_add(key, memory.load(q, m2, j), a2)
                a3 = vectors.multiply_add(key, memory.load(q, m3, j), a3)
            memory.store(scores, quad, QUAD * n, vectors.totals(a0, a1, a2, a3))


@kernel()
def _score_pruned(layout, rows, slots, head, q, scores, value_rows):
    halves = rows.view(np.uint16)
    weights = memory.empty_tile(QUAD, max(LANES, layout.positions.size))
    # Of a kept word's sign and position: the query's entry there, of four queries.
    table = np.zeros(2 * QUAD << layout.position_bits, np.float32)
    constants = np.empty((2, QUAD), np.float32)
    for quad in range(scores.shape[0]):
        _prepare(layout, head, q, quad, weights, table, constants)
        _score_fields(layout, rows, halves, slots, head, weights, constants, scores[quad])
        _add_kept(layout, halves, slots, head, table, scores[quad], value_rows)


@kernel()
def _prepare(layout, head, q, quad, weights, table, constants):
    """Four queries as the other functions take them.

    ``constants`` get their products with the middles of all levels, and with the centre.
    """
    order, centre, unit = layout.order, layout.centre, layout.unit
    positions = layout.positions.ravel()
    negative = QUAD << layout.position_bits
    for lane in range(QUAD):
        query = q[min(QUAD * quad + lane, q.shape[0] - 1)]
        middle = at_centre = np.float32(0.0)
        for position in range(query.shape[0]):
            x = query[order[head, position]]
            table[QUAD * position + lane] = x
            table[negative + QUAD * position + lane] = -x
            at_centre += x * centre[head, position]
            middle += x * unit[head, position] * layout.middles[position]
        constants[0, lane], constants[1, lane] = middle, at_centre
        for i in range(positions.shape[0]):
            position = positions[i]
            is_ours = position >= 0
            weights[lane, i] = query[order[head, position]] * unit[head, position] if is_ours else np.float32(0.0)


@kernel()
def _score_fields(layout, rows, halves, slots, head, weights, constants, scores):
    """Set ``scores[4 * n : 4 * n + 4]`` to the products of four queries with token n's centre and restoration.

    Two tokens at a time, so that a query is loaded once for both.
    """
    pairs = layout.pairs
    zero = vectors.splat(np.float32(0.0))
    middle, at_centre = memory.load4(constants[0], 0), memory.load4(constants[1], 0)
    for n in range(0, slots.shape[0], 2):
        next_n = min(n + 1, slots.shape[0] - 1)
        slot_a, slot_b = memory.at(slots, n), memory.at(slots, next_n)
        _prefetch(rows, slots, n + _AHEAD, head)
        _prefetch(rows, slots, n + _AHEAD + 1, head)
        a0, a1, a2, a3 = zero, zero, zero, zero
        b0, b1, b2, b3 = zero, zero, zero, zero
        for i in range(pairs.shape[0]):
            first, shift, bits = np.intp(pairs[i, 0]), pairs[i, 1], pairs[i, 2]
            j = 2 * LANES * i
            a = memory.load_codes(rows, slot_a, head, first, shift, bits)
            b = memory.load_codes(rows, slot_b, head, first, shift, bits)
            query = memory.load(weights, 0, j)
            a0, b0 = vectors.multiply_add(query, a, a0), vectors.multiply_add(query, b, b0)
            query = memory.load(weights, 1, j)
            a1, b1 = vectors.multiply_add(query, a, a1), vectors.multiply_add(query, b, b1)
            query = memory.load(weights, 2, j)
            a2, b2 = vectors.multiply_add(query, a, a2), vectors.multiply_add(query, b, b2)
            query = memory.load(weights, 3, j)
            a3, b3 = vectors.multiply_add(query, a, a3), vectors.multiply_add(query, b, b3)
            j += LANES
            a = memory.load_codes(rows, slot_a, head, first, shift + bits, bits)
            b = memory.load_codes(rows, slot_b, head, first, shift + bits, bits)
            query = memory.load(weights, 0, j)
            a0, b0 = vectors.multiply_add(query, a, a0), vectors.multiply_add(query, b, b0)
            query = memory.load(weights, 1, j)
            a1, b1 = vectors.multiply_add(query, a, a1), vectors.multiply_add(query, b, b1)
            query = memory.load(weights, 2, j)
            a2, b2 = vectors.multiply_add(query, a, a2), vectors.multiply_add(query, b, b2)
            query = memory.load(weights, 3, j)
            a3, b3 = vectors.multiply_add(query, a, a3), vectors.multiply_add(query, b, b3)
        # An odd last token is computed twice, to the same result.
        _set(scores, next_n, halves, slot_b, head, layout.scales, vectors.totals(b0, b1, b2, b3), middle, at_centre)
        _set(scores, n, halves, slot_a, head, layout.scales, vectors.totals(a0, a1, a2, a3), middle, at_centre)


@kernel(forceinline=True)
def _set(scores, n, halves, slot, head, scale, products, middle, at_centre):
    tau = vectors.splat4(half_to_float(memory.at3(halves, slot, head, scale)))
    memory.store1(scores, QUAD * n, vectors.multiply_add(tau, vectors.add(products, middle), at_centre))


@kernel()
def _add_kept(layout, halves, slots, head, table, scores, value_rows):
    """Add the products of four queries with token n's kept channels to ``scores[4 * n : 4 * n + 4]``.

    Four tokens at a time, for the CPU's pipelines: a token's sum waits for its own last step only.
    """
    length = halves.shape[2]
    numbers = np.empty(4 * length, np.float32)
    places = np.empty(4 * length, np.uint16)
    last = slots.shape[0] - 1
    for n in range(0, slots.shape[0], 4):
        for k in range(4):
            slot = memory.at(slots, min(n + k, last))
            _prefetch(value_rows, slots, n + k, head)
            _unpack_kept(layout, halves, slot, head, numbers, places, k * length)
        a = b = c = d = vectors.splat4(np.float32(0.0))
        for i in range(layout.kept, layout.end):
            a = vectors.multiply_add(_number(numbers, i), _entries(table, places, i), a)
            b = vectors.multiply_add(_number(numbers, i + length), _entries(table, places, i + length), b)
            c = vectors.multiply_add(_number(numbers, i + 2 * length), _entries(table, places, i + 2 * length), c)
            d = vectors.multiply_add(_number(numbers, i + 3 * length), _entries(table, places, i + 3 * length), d)
        _add(scores, n, halves, slots, head, layout.scales, a)
        _add(scores, n + 1, halves, slots, head, layout.scales, b)
        _add(scores, n + 2, halves, slots, head, layout.scales, c)
        _add(scores, n + 3, halves, slots, head, layout.scales, d)


@kernel(forceinline=True)
def _add(scores, n, halves, slots, head, scale, products):
    if n < slots.shape[0]:
        kappa = half_to_float(memory.at3(halves, memory.at(slots, n), head, scale + 1))
        restored = memory.load4(scores, QUAD * n)
        memory.store1(scores, QUAD * n, vectors.multiply_add(products, vectors.splat4(kappa), restored))


@kernel(forceinline=True)
def _unpack_kept(layout, halves, slot, head, numbers, places, at):
    """Magnitudes of the kept words as float32, and the places of their signs and positions in the table."""
    length = halves.shape[2]
    bits = np.int32(layout.magnitude_bits)
    if length >= LANES:
        # The last vector ends with the row, and overlaps the one before it.
        for first in range(layout.kept, layout.end, LANES):
            i = min(first, length - LANES)
            memory.store1(numbers, at + i, memory.load_low_bits(halves, slot, head, i, bits))
            memory.store_high_bits(places, at + i, halves, slot, head, i, bits)
    else:
        for i in range(layout.kept, layout.end):
            word = np.int32(halves[slot, head, i])
            numbers[at + i] = np.float32(word & ((1 << bits) - 1))
            places[at + i] = QUAD * (word >> bits)


@kernel(forceinline=True)
def _number(numbers, i):
    return vectors.splat4(memory.at(numbers, i))


@kernel(forceinline=True)
def _entries(table, places, i):
    return memory.load4(table, np.intp(memory.at(places, i)))
