"""Rows of the cache to float32."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numba import prange, types
from numba.extending import overload

from spark_kernels.cpu import memory, vectors
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.numbers import half_to_float
from spark_kernels.cpu.threads import call_parallel
from spark_kernels.cpu.values import int4_vector, restore_int4
from spark_kernels.cpu.vector_types import LANES
from spark_kernels.formats import CompressedKeyFormat, Int4ValueFormat, LayerRows, RawKeyFormat, ValueFormat

# How a row of numbers is stored; compressed key rows have codes below. int4 rows have the offset of their scales, in
# 16-bit words, added to the last code.
BFLOAT16, FLOAT16, FLOAT32, FLOAT8, INT4 = range(5)
_NUMBER_CODES = {
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float32: FLOAT32,
    torch.float8_e4m3fn: FLOAT8,
}
# By the dtype that a view of rows has in kernels; some other dtype of its size stands for one that numba lacks.
_LOAD = {
    types.uint16: memory.load_bfloat16,
    types.int16: memory.load_float16,
    types.float32: memory.load_float32,
    types.uint8: memory.load_float8,
    types.int8: int4_vector,
}
# -1 - restore_bits
COMPRESSED_0, COMPRESSED_1, COMPRESSED_2 = -1, -2, -3


@cache
def key_layout(key_format: CompressedKeyFormat | RawKeyFormat) -> tuple[int, int, int, int, int]:
    """What kernels need of a key format.

    Its code, the offsets of the second bit plane, of the scales and of the kept words counted in 16-bit words, and
    the index bits of a kept word.
    """
    if key_format.is_raw:
        return _NUMBER_CODES[key_format.dtype], 0, 0, 0, 0
    return (
        -1 - key_format.restore_bits,
        (key_format.plane_offset + key_format.bit_plane_bytes) // 2,
        key_format.scale_offset // 2,
        key_format.kept_offset // 2,
        key_format.index_bits,
    )


@cache
def value_layout(value_format: ValueFormat | Int4ValueFormat) -> int:
    """What kernels need of a value format: its code."""
    if value_format.is_int4:
        return INT4 + value_format.scale_offset // 2
    return _NUMBER_CODES[value_format.dtype]


def number_vector(numbers, slot, head, j):
    """16 numbers of one head's row at ``slot``, from channel ``j`` on, as float32; for kernels.

    ``numbers`` is a view of rows with one of the dtypes of ``_LOAD``.
    """
    raise NotImplementedError("only in compiled code")


@overload(number_vector, inline="always")
def _number_vector(numbers, slot, head, j):
    load = _LOAD[numbers.dtype]
    return lambda numbers, slot, head, j: load(numbers, slot, head, j)


@kernel()
def _load_numbers(numbers, slots, first, count, head, tile, row):
    for n in range(count):
        for j in range(0, tile.shape[1], LANES):
            memory.store(tile, row + n, j, number_vector(numbers, slots[first + n], head, j))


@kernel()
def _scatter_kept(layout, rows, slots, first, count, head, integers, row):
    """The kept integers to their channels, as int32, and 0 to all others."""
    _, _, _, kept, index_bits = layout
    words = rows.view(np.int16)
    # Unsigned indices spare the check for negative ones, a third of this loop's time.
    channel_mask = np.uint64((1 << index_bits) - 1)
    for n in range(count):
        slot = slots[first + n]
        for j in range(0, integers.shape[1], LANES):
            memory.clear(integers, row + n, j)
        for i in range(np.uint64(kept), np.uint64(words.shape[2])):
            word = np.int32(words[slot, head, i])
            integers[row + n, np.uint64(word) & channel_mask] = word >> np.int32(index_bits)


@kernel()
def load_keys(layout, rows, slots, first, count, head, tile, row):
    """Keys restored from rows at ``slots[first : first + count]`` of one head, to ``tile[row : row + count]``."""
    code, second_plane, scales, _, _ = layout
    if code == BFLOAT16:
        _load_numbers(rows.view(np.uint16), slots, first, count, head, tile, row)
        return
    if code == FLOAT16:
        _load_numbers(rows.view(np.int16), slots, first, count, head, tile, row)
        return
    if code == FLOAT32:
        _load_numbers(rows.view(np.float32), slots, first, count, head, tile, row)
        return
    halves = rows.view(np.uint16)
    # All rows before any is read as vectors: the CPU cannot forward several narrow stores to one wide load.
    integers = tile.view(np.int32)
    _scatter_kept(layout, rows, slots, first, count, head, integers, row)
    for n in range(row, row + count):
        slot = slots[first + n - row]
        plane_scale = half_to_float(halves[slot, head, scales])
        kept_scale = vectors.splat(half_to_float(halves[slot, head, scales + 1]))
        for i in range(tile.shape[1] // LANES):
            if code == COMPRESSED_2:
                high, low = halves[slot, head, i], halves[slot, head, second_plane + i]
                plane = vectors.multiply(vectors.two_bit_levels(high, low), vectors.splat(plane_scale))
            elif code == COMPRESSED_1:
                plane = vectors.signed(halves[slot, head, i], plane_scale)
            else:
                plane = vectors.splat(np.float32(0.0))
            kept = memory.load_int32(integers, n, i * LANES)
            memory.store(tile, n, i * LANES, vectors.multiply_add(kept, kept_scale, plane))


@kernel(parallel=True)
def _restore(layout, rows, slots, out):
    heads = rows.shape[1]
    for work in prange(slots.shape[0] * heads):
        load_keys(layout, rows, slots, work // heads, 1, work % heads, out, work)


def restore_keys(rows: LayerRows, slots: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See `spark_kernels.reference.restore_keys`; ``out`` is a contiguous float32 workspace to fill."""
    if out is None:
        out = torch.empty(slots.shape[0], rows.num_kv_heads, rows.key_format.head_dim)
    call_parallel(
        _restore,
        key_layout(rows.key_format),
        rows.arrays[0],
        slots.to(torch.int64).numpy(),
        out.flatten(0, 1).numpy(),
    )
    return out


def restore_values(rows: LayerRows, slots: torch.Tensor, v_scale: float) -> torch.Tensor:
    """See `spark_kernels.reference.restore_values`; in the stored dtype where that needs no conversion."""
    if rows.value_format.is_int4:
        return restore_int4(rows, slots, v_scale)
    values = rows.values.view(torch.int64)[slots].view(rows.value_format.dtype)
    if v_scale == 1.0 and values.dtype != torch.float8_e4m3fn:
        return values
    return values.float().mul_(v_scale)
