"""Rows of the cache to float32."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange, types
from numba.extending import overload

from spark_kernels.cpu import memory
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.fields import BFLOAT16, CODES, FLOAT16, key_layout, value_layout
from spark_kernels.cpu.hadamard import transform
from spark_kernels.cpu.numbers import half_to_float
from spark_kernels.cpu.threads import call_parallel
from spark_kernels.cpu.vector_types import LANES
from spark_kernels.formats import Numbers
from spark_kernels.reference import hadamard_scales
from spark_kernels.rows import LayerRows

# By the dtype that a view of rows has in kernels; some other dtype of its size stands for one that numba lacks.
_LOAD = {
    types.uint16: memory.load_bfloat16,
    types.int16: memory.load_float16,
    types.float32: memory.load_float32,
    types.uint8: memory.load_float8,
}


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
def _load_numbers(numbers, slot, head, out):
    for j in range(0, out.shape[1], LANES):
        memory.store(out, 0, j, number_vector(numbers, slot, head, j))


@kernel()
def _unpack(planes, row, out):
    """The codes of a row's planes, as float32 by position; 0 where there are none."""
    out[:] = np.float32(0.0)
    for i in range(planes.shape[0]):
        bits, start, first, count, shift = planes[i]
        mask = (1 << bits) - 1
        weight = np.float32(1 << shift)
        for j in range(count):
            byte = np.int32(row[first + j])
            for place in range(8 // bits):
                out[start + place] += weight * np.float32(byte >> (place * bits) & mask)
            start += 8 // bits


@kernel()
def _restore_key(layout, row, head, codes, out):
    order, centre, unit = layout.order, layout.centre, layout.unit
    words = row.view(np.uint16)
    _unpack(layout.planes, row, codes)
    tau, kappa = half_to_float(words[layout.scales]), half_to_float(words[layout.scales + 1])
    for position in range(codes.shape[0]):
        codes[position] = (codes[position] + layout.middles[position]) * (unit[head, position] * tau)
    for i in range(layout.kept, layout.end):
        word = np.int32(words[i])
        integer = np.float32(word & ((1 << layout.magnitude_bits) - 1))
        position = word >> layout.magnitude_bits & ((1 << layout.position_bits) - 1)
        codes[position] += (-integer if word >> 15 else integer) * kappa
    for position in range(codes.shape[0]):
        out[order[head, position]] = centre[head, position] + codes[position]


@kernel(parallel=True)
def _restore_keys(layout, rows, slots, out):
    heads = rows.shape[1]
    for work in prange(slots.shape[0] * heads):
        slot, head = slots[work // heads], work % heads
        if layout.code == CODES:
            _restore_key(layout, rows[slot, head], head, np.empty(out.shape[1], np.float32), out[work])
        elif layout.code == BFLOAT16:
            _load_numbers(rows.view(np.uint16), slot, head, out[work : work + 1])
        elif layout.code == FLOAT16:
            _load_numbers(rows.view(np.int16), slot, head, out[work : work + 1])
        else:
            _load_numbers(rows.view(np.float32), slot, head, out[work : work + 1])


def restore_keys(rows: LayerRows, slots: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """See `spark_kernels.reference.restore_keys`; ``out`` is a contiguous float32 workspace to fill."""
    if out is None:
        out = torch.empty(slots.shape[0], rows.num_kv_heads, rows.key_format.head_dim)
    call_parallel(
        _restore_keys, key_layout(rows), rows.arrays[0], slots.to(torch.int64).numpy(), out.flatten(0, 1).numpy()
    )
    return out


@kernel(parallel=True)
def _restore_integers(layout, rows, slots, back, v_scale, out):
    heads = rows.shape[1]
    for work in prange(slots.shape[0] * heads):
        row = rows[slots[work // heads], work % heads]
        scale = half_to_float(row.view(np.uint16)[layout.scale])
        _unpack(layout.planes, row, out[work])
        for j in range(out.shape[1]):
            out[work, j] = (out[work, j] + layout.middles[j]) * scale
        if back > 0:
            transform(out, work, layout.block)
            for j in range(out.shape[1]):
                out[work, j] *= back
        for j in range(out.shape[1]):
            out[work, j] *= v_scale


def restore_values(rows: LayerRows, slots: torch.Tensor, v_scale: float, *, transformed: bool = False) -> torch.Tensor:
    """See `spark_kernels.reference.restore_values`; numbers in their own dtype where that needs no conversion.

    ``transformed`` leaves integers without the transform back.
    """
    made = rows.value_format
    if isinstance(made, Numbers):
        values = rows.values.view(torch.int64)[slots].view(made.dtype)
        if v_scale == 1.0 and values.dtype != torch.float8_e4m3fn:
            return values
        return values.float().mul_(v_scale)
    out = torch.empty(slots.shape[0], rows.num_kv_heads, made.head_dim)
    call_parallel(
        _restore_integers,
        value_layout(made),
        rows.arrays[1],
        slots.to(torch.int64).numpy(),
        np.float32(0.0 if transformed else hadamard_scales(made.block)[1]),
        np.float32(v_scale),
        out.flatten(0, 1).numpy(),
    )
    return out
