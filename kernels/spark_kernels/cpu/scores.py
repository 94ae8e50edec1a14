"""Products of queries with cached keys, without a dense copy of the keys.

Queries are taken four at a time. A compressed key's product with a query is
``plane_scale * (unit plane . q) + kept_scale * sum(integer * q[channel])``: the plane is expanded in registers, 16
channels at a time, and each kept channel fetches its entry of all four queries from a table at once.
"""

from __future__ import annotations

import numpy as np

from spark_kernels.cpu import memory, vectors
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.numbers import half_to_float
from spark_kernels.cpu.rows import BFLOAT16, COMPRESSED_0, COMPRESSED_2, FLOAT16, number_vector
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
    code = layout[0]
    if code < 0:
        _score_compressed(layout, rows, slots, head, q, scores, value_rows)
    elif code == BFLOAT16:
        _score_raw(rows.view(np.uint16), slots, head, q, scores, value_rows)
    elif code == FLOAT16:
        _score_raw(rows.view(np.int16), slots, head, q, scores, value_rows)
    else:
        _score_raw(rows.view(np.float32), slots, head, q, scores, value_rows)


@kernel(forceinline=True)
def _prefetch(rows, slots, n, head):
    """Ask for token ``n``'s row: slots are scattered, so the CPU cannot foresee them."""
    slot = memory.at(slots, min(n, slots.shape[0] - 1))
    for i in range(0, rows.shape[2], _CACHE_LINE // rows.itemsize):
        memory.prefetch(rows, slot, head, i)
    # Rows need not begin with a cache line, so they may reach into one more.
    if rows.shape[2] * rows.itemsize % _CACHE_LINE:
        memory.prefetch(rows, slot, head, rows.shape[2] - 1)


@kernel(forceinline=True)
def _members(quad, group):
    """The quad's four queries."""
    last = group - 1
    return QUAD * quad, min(QUAD * quad + 1, last), min(QUAD * quad + 2, last), min(QUAD * quad + 3, last)


@kernel()
def _score_raw(numbers, slots, head, q, scores, value_rows):
    zero = vectors.splat(np.float32(0.0))
    for quad in range(scores.shape[0]):
        m0, m1, m2, m3 = _members(quad, q.shape[0])
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
def _score_compressed(layout, rows, slots, head, q, scores, value_rows):
    halves, words = rows.view(np.uint16), rows.view(np.int16)
    table = np.empty(QUAD * q.shape[1], np.float32)
    for quad in range(scores.shape[0]):
        members = _members(quad, q.shape[0])
        _score_planes(layout, halves, slots, head, q, members, scores[quad])
        for j in range(q.shape[1]):
            for lane in range(QUAD):
                table[QUAD * j + lane] = q[members[lane], j]
        _add_kept(layout, words, halves, slots, head, table, scores[quad], value_rows)


@kernel()
def _score_planes(layout, halves, slots, head, q, members, scores):
    """Set ``scores[4 * n : 4 * n + 4]`` to the products of four queries with token n's restore plane.

    Two tokens at a time, so that a query is loaded once for both.
    """
    code, second_plane, scale, _, _ = layout
    zero = vectors.splat(np.float32(0.0))
    for n in range(0, slots.shape[0], 2):
        next_n = min(n + 1, slots.shape[0] - 1)
        slot_a, slot_b = memory.at(slots, n), memory.at(slots, next_n)
        _prefetch(halves, slots, n + _AHEAD, head)
        _prefetch(halves, slots, n + _AHEAD + 1, head)
        a0, a1, a2, a3 = zero, zero, zero, zero
        b0, b1, b2, b3 = zero, zero, zero, zero
        if code != COMPRESSED_0:
            for i in range(q.shape[1] // LANES):
                if code == COMPRESSED_2:
                    a = vectors.two_bit_levels(
                        memory.at3(halves, slot_a, head, i), memory.at3(halves, slot_a, head, second_plane + i)
                    )
                    b = vectors.two_bit_levels(
                        memory.at3(halves, slot_b, head, i), memory.at3(halves, slot_b, head, second_plane + i)
                    )
                else:
                    a = vectors.signed(memory.at3(halves, slot_a, head, i), np.float32(1.0))
                    b = vectors.signed(memory.at3(halves, slot_b, head, i), np.float32(1.0))
                query = memory.load(q, members[0], i * LANES)
                a0, b0 = vectors.multiply_add(query, a, a0), vectors.multiply_add(query, b, b0)
                query = memory.load(q, members[1], i * LANES)
                a1, b1 = vectors.multiply_add(query, a, a1), vectors.multiply_add(query, b, b1)
                query = memory.load(q, members[2], i * LANES)
                a2, b2 = vectors.multiply_add(query, a, a2), vectors.multiply_add(query, b, b2)
                query = memory.load(q, members[3], i * LANES)
                a3, b3 = vectors.multiply_add(query, a, a3), vectors.multiply_add(query, b, b3)
        scale_a = half_to_float(memory.at3(halves, slot_a, head, scale))
        scale_b = half_to_float(memory.at3(halves, slot_b, head, scale))
        memory.store1(scores, QUAD * n, vectors.scaled(vectors.totals(a0, a1, a2, a3), scale_a))
        memory.store1(scores, QUAD * next_n, vectors.scaled(vectors.totals(b0, b1, b2, b3), scale_b))


@kernel()
def _add_kept(layout, words, halves, slots, head, table, scores, value_rows):
    """Add the products of four queries with token n's kept channels to ``scores[4 * n : 4 * n + 4]``.

    Four tokens at a time, for the CPU's pipelines: a token's sum waits for its own last step only.
    """
    _, _, scale, kept, index_bits = layout
    length = words.shape[2]
    numbers = np.empty(4 * length, np.float32)
    places = np.empty(4 * length, np.uint16)
    last = slots.shape[0] - 1
    for n in range(0, slots.shape[0], 4):
        for k in range(4):
            slot = memory.at(slots, min(n + k, last))
            _prefetch(value_rows, slots, n + k, head)
            _unpack_kept(words, slot, head, kept, index_bits, numbers, places, k * length)
        a = b = c = d = vectors.splat4(np.float32(0.0))
        for i in range(kept, length):
            a = vectors.multiply_add(_number(numbers, i), _entries(table, places, i), a)
            b = vectors.multiply_add(_number(numbers, i + length), _entries(table, places, i + length), b)
            c = vectors.multiply_add(_number(numbers, i + 2 * length), _entries(table, places, i + 2 * length), c)
            d = vectors.multiply_add(_number(numbers, i + 3 * length), _entries(table, places, i + 3 * length), d)
        _add(scores, n, halves, slots, head, scale, a)
        _add(scores, n + 1, halves, slots, head, scale, b)
        _add(scores, n + 2, halves, slots, head, scale, c)
        _add(scores, n + 3, halves, slots, head, scale, d)


@kernel(forceinline=True)
def _add(scores, n, halves, slots, head, scale, products):
    if n < slots.shape[0]:
        kept_scale = half_to_float(memory.at3(halves, memory.at(slots, n), head, scale + 1))
        plane = memory.load4(scores, QUAD * n)
        memory.store1(scores, QUAD * n, vectors.multiply_add(products, vectors.splat4(kept_scale), plane))


@kernel(forceinline=True)
def _unpack_kept(words, slot, head, kept, index_bits, numbers, places, at):
    """The integers of the words from ``kept`` on as float32, and their channels' places in the table."""
    length = words.shape[2]
    if length >= LANES:
        # The last vector ends with the row, and overlaps the one before it.
        for first in range(kept, length, LANES):
            i = min(first, length - LANES)
            memory.store1(numbers, at + i, memory.load_high_bits(words, slot, head, i, index_bits))
            memory.store_low_bits(places, at + i, words, slot, head, i, index_bits)
    else:
        _unpack_short(words, slot, head, kept, index_bits, numbers, places, at)


@kernel()
def _unpack_short(words, slot, head, kept, index_bits, numbers, places, at):
    for i in range(kept, words.shape[2]):
        numbers[at + i] = np.float32(words[slot, head, i] >> index_bits)
        places[at + i] = QUAD * (words[slot, head, i] & ((1 << index_bits) - 1))


@kernel(forceinline=True)
def _number(numbers, i):
    return vectors.splat4(memory.at(numbers, i))


@kernel(forceinline=True)
def _entries(table, places, i):
    return memory.load4(table, np.intp(memory.at(places, i)))
