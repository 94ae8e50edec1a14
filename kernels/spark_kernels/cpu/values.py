"""int4 value rows: written, and read to float32.

The arithmetic of writing follows `spark_kernels.reference` operation by operation.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange

from spark_kernels.cpu import memory, vectors
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.numbers import bits_to_float, float_to_half, half_to_float
from spark_kernels.cpu.threads import call_parallel
from spark_kernels.formats import INT4_GROUPS, INT4_LIMIT, LayerRows

_FLOAT16_MAX_BITS = np.float32(torch.finfo(torch.float16).max).view(np.uint32)
_HALF_NAN = np.uint16(0x7E00)
_SIGN, _MAGNITUDE, _INFINITY = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


@kernel()
def _scale(bits):
    """float16 bits of the scale of one group, given the bits of its numbers."""
    # As integers, magnitudes are in order and NaN is above all: such loops vectorise.
    largest = np.uint32(0)
    for j in range(bits.shape[0]):
        largest = max(largest, bits[j] & _MAGNITUDE)
    if largest > _INFINITY:
        return _HALF_NAN
    largest = min(largest, _FLOAT16_MAX_BITS)
    is_negative = largest == 0
    for j in range(bits.shape[0]):
        is_negative |= bits[j] >= _SIGN | largest
    scale = bits_to_float(largest) / np.float32(INT4_LIMIT)
    return float_to_half(scale if is_negative else -scale)


# A check for zero divisors would keep the loop from vectorising.
@kernel(error_model="numpy")
def _pack_row(v, scales, halves):
    """Write one value to the 16-bit words of its row, whose scales begin at word ``scales``."""
    group_channels = v.shape[0] // INT4_GROUPS
    low, high = np.float32(-INT4_LIMIT), np.float32(INT4_LIMIT - 1)
    halves[:scales] = 0
    for i in range(INT4_GROUPS):
        group = v[i * group_channels : (i + 1) * group_channels]
        halves[scales + i] = _scale(group.view(np.uint32))
        scale = half_to_float(halves[scales + i])
        is_zero = not abs(scale) > 0
        inverse = np.float32(1.0) / scale
        shift = np.int32(4 * i)
        for j in range(group_channels):
            x = np.rint(group[j] * inverse)
            x = low if x < low else high if x > high else x
            integer = np.int32(0.0 if is_zero else x)
            halves[j] |= np.uint16(integer + np.int32(INT4_LIMIT) << shift)


@kernel(parallel=True)
def _pack(v, scales, slots, rows):
    heads = rows.shape[1]
    for work in prange(v.shape[0]):
        _pack_row(v[work], scales, rows[slots[work // heads], work % heads].view(np.uint16))


@kernel()
def load_int4(scales, rows, slots, first, count, head, tile, row):
    """Values at ``slots[first : first + count]`` of one head, to ``tile[row : row + count]``.

    ``scales`` is the offset of a row's scales in 16-bit words.
    """
    halves = rows.view(np.uint16)
    group_channels = tile.shape[1] // INT4_GROUPS
    for n in range(count):
        words = halves[slots[first + n], head]
        for i in range(INT4_GROUPS):
            scale = half_to_float(words[scales + i])
            group = tile[row + n, i * group_channels : (i + 1) * group_channels]
            shift = np.int32(4 * i)
            for j in range(group_channels):
                integer = (np.int32(words[j]) >> shift & np.int32(2 * INT4_LIMIT - 1)) - np.int32(INT4_LIMIT)
                group[j] = scale * np.float32(integer)


@kernel(forceinline=True)
def int4_vector(rows, slot, head, j):
    """16 channels of one head's value at ``slot``, from channel ``j`` on; ``rows`` is int8, and a group whole vectors.

    A row is 16-bit words, as many as a group has channels, and then the groups' scales.
    """
    group_channels = rows.shape[2] // 2 - INT4_GROUPS
    group, word = j // group_channels, j % group_channels
    scale = memory.load_half(rows, slot, head, 2 * (group_channels + group))
    nibbles = memory.load_nibbles(rows, slot, head, 2 * word, np.int32(4 * group))
    return vectors.multiply_add(nibbles, vectors.splat(scale), vectors.splat(np.float32(-INT4_LIMIT) * scale))


@kernel(parallel=True)
def _restore(scales, rows, slots, v_scale, out):
    heads = rows.shape[1]
    for work in prange(slots.shape[0] * heads):
        load_int4(scales, rows, slots, work // heads, 1, work % heads, out, work)
        for j in range(out.shape[1]):
            out[work, j] *= v_scale


def write_int4(v: torch.Tensor, slots: torch.Tensor, rows: LayerRows, v_scale: float) -> None:
    """Store ``v / v_scale`` at ``slots`` of int4 ``rows``; see `spark_kernels.reference.encode_values`."""
    v = v.float() if v_scale == 1.0 else v.float() / v_scale
    call_parallel(
        _pack,
        v.flatten(0, 1).contiguous().numpy(),
        rows.value_format.scale_offset // 2,
        slots.numpy(),
        rows.values.numpy(),
    )


def restore_int4(rows: LayerRows, slots: torch.Tensor, v_scale: float) -> torch.Tensor:
    """Values at ``slots`` of int4 ``rows``; see `spark_kernels.reference.restore_values`."""
    out = torch.empty(slots.shape[0], rows.num_kv_heads, rows.value_format.head_dim)
    call_parallel(
        _restore,
        rows.value_format.scale_offset // 2,
        rows.values.numpy(),
        slots.to(torch.int64).numpy(),
        np.float32(v_scale),
        out.flatten(0, 1).numpy(),
    )
    return out
