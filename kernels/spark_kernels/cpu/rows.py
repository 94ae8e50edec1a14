"""Rows of the cache to float32."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from spark_kernels.cpu import vectors
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.numbers import bfloat16_to_float, float8_to_float, half_to_float
from spark_kernels.cpu.threads import call_parallel
from spark_kernels.cpu.values import load_int4, restore_int4
from spark_kernels.record import CompressedKeyFormat, Int4ValueFormat, LayerRows, RawKeyFormat, ValueFormat

# How a row of numbers is stored; compressed key rows have codes below. int4 rows have the offset of their scales, in
# 16-bit words, added to the last code.
_BFLOAT16, _FLOAT16, _FLOAT32, _FLOAT8, _INT4 = range(5)
_NUMBER_CODES = {
    torch.bfloat16: _BFLOAT16,
    torch.float16: _FLOAT16,
    torch.float32: _FLOAT32,
    torch.float8_e4m3fn: _FLOAT8,
}
# -1 - restore_bits
_COMPRESSED_0, _COMPRESSED_1, _COMPRESSED_2 = -1, -2, -3


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


def value_layout(value_format: ValueFormat | Int4ValueFormat) -> int:
    """What kernels need of a value format: its code."""
    if value_format.is_int4:
        return _INT4 + value_format.scale_offset // 2
    return _NUMBER_CODES[value_format.dtype]


@kernel()
def load_numbers(code, rows, slots, first, count, head, tile, row):
    """Numbers at ``slots[first : first + count]`` of one head, as float32 to ``tile[row : row + count]``."""
    if code >= _INT4:
        load_int4(code - _INT4, rows, slots, first, count, head, tile, row)
        return
    halves = rows.view(np.uint16)
    for n in range(count):
        slot = slots[first + n]
        if code == _BFLOAT16:
            for j in range(tile.shape[1]):
                tile[row + n, j] = bfloat16_to_float(halves[slot, head, j])
        elif code == _FLOAT16:
            for j in range(tile.shape[1]):
                tile[row + n, j] = half_to_float(halves[slot, head, j])
        elif code == _FLOAT32:
            floats = rows.view(np.float32)
            for j in range(tile.shape[1]):
                tile[row + n, j] = floats[slot, head, j]
        else:
            for j in range(tile.shape[1]):
                tile[row + n, j] = float8_to_float(rows[slot, head, j])


@kernel()
def load_keys(layout, rows, slots, first, count, head, tile, row):
    """Keys restored from rows at ``slots[first : first + count]`` of one head, to ``tile[row : row + count]``."""
    code, second_plane, scales, kept, index_bits = layout
    if code >= 0:
        load_numbers(code, rows, slots, first, count, head, tile, row)
        return
    halves = rows.view(np.uint16)
    words = rows.view(np.int16)
    pieces = tile.shape[1] // vectors.LANES
    shift = np.int32(index_bits)
    channel_mask = np.uint64((1 << index_bits) - 1)
    for n in range(count):
        slot = slots[first + n]
        plane_scale = half_to_float(halves[slot, head, scales])
        kept_scale = half_to_float(halves[slot, head, scales + 1])
        if code == _COMPRESSED_2:
            for i in range(pieces):
                high = vectors.signed(halves[slot, head, i], np.float32(0.5) * plane_scale)
                low = vectors.signed(halves[slot, head, second_plane + i], np.float32(0.25) * plane_scale)
                vectors.store(tile, row + n, i * vectors.LANES, vectors.add(high, low))
        elif code == _COMPRESSED_1:
            for i in range(pieces):
                plane = vectors.signed(halves[slot, head, i], plane_scale)
                vectors.store(tile, row + n, i * vectors.LANES, plane)
        else:
            for i in range(pieces):
                vectors.store(tile, row + n, i * vectors.LANES, vectors.splat(np.float32(0.0)))
        # Unsigned indices spare the check for negative ones, a third of this loop's time.
        for i in range(np.uint64(kept), np.uint64(words.shape[2])):
            word = np.int32(words[slot, head, i])
            tile[row + n, np.uint64(word) & channel_mask] += kept_scale * np.float32(word >> shift)


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
        rows.keys.numpy(),
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
