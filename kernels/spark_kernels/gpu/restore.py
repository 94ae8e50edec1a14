"""Rows at a list of slots to dense keys and values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_kernels.formats import Integers, Numbers
from spark_kernels.gpu.merge import transform
from spark_kernels.gpu.rows import (
    IntegersLayout,
    PrunedLayout,
    check_head_dim,
    float8_bits_to_half,
    key_rows,
    load_half,
    value_rows,
)
from spark_kernels.reference import hadamard_scales
from spark_kernels.rows import LayerRows

BLOCK_TOKENS = 8


@triton.jit
def _code(row, position, first, bits):
    """The code at ``position`` of a plane of ``bits`` bits that begins at byte ``first``."""
    bit = position * bits
    return tl.load(row + first + bit // 8).to(tl.int32) >> (bit % 8) & ((1 << bits) - 1)


@triton.jit
def _restored(row, position, unit, tau, LAYOUT: tl.constexpr):
    """What the codes of the rows at ``row`` stand for, at each ``position``."""
    TWOS: tl.constexpr = LAYOUT.count_4
    ONES: tl.constexpr = LAYOUT.count_4 + LAYOUT.count_2
    is_four = position < TWOS
    is_two = position < ONES
    bits = tl.where(is_four, 4, tl.where(is_two, 2, tl.where(position < ONES + LAYOUT.count_1, 1, 0)))
    start = tl.where(is_four, 0, tl.where(is_two, TWOS, ONES))
    first = tl.where(is_four, 0, tl.where(is_two, LAYOUT.first_2, LAYOUT.first_1))
    # Where there are no bits the unit is 0.
    middle = tl.where(is_four, -7.5, tl.where(is_two, -1.5, -0.5))
    return (_code(row, position - start, first, bits).to(tl.float32) + middle) * (unit * tau)


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["slots_ptr"])
def _restore_keys(
    rows_ptr,
    slots_ptr,
    order_ptr,
    position_ptr,
    centre_ptr,
    unit_ptr,
    out_ptr,
    num_slots,
    NUM_KV_HEADS: tl.constexpr,
    LAYOUT: tl.constexpr,
    KEPT_BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One program per (block of slots, KV head). Kept channels are written over the restored ones."""
    D: tl.constexpr = LAYOUT.head_dim
    head = tl.program_id(1)
    index = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    # Beyond the end the last slot is restored again, to the same numbers.
    index = tl.minimum(index, num_slots - 1)
    slot = tl.load(slots_ptr + index).to(tl.int64)
    row = (rows_ptr + (slot * NUM_KV_HEADS + head) * LAYOUT.row_bytes)[:, None]
    out = (out_ptr + (index * NUM_KV_HEADS + head) * D)[:, None]
    tau, kappa = load_half(row, LAYOUT.scale_half), load_half(row, LAYOUT.scale_half + 1)

    channels = tl.arange(0, D)[None, :]
    position = tl.load(position_ptr + head * D + channels)
    centre = tl.load(centre_ptr + head * D + position)
    key = centre + _restored(row, position, tl.load(unit_ptr + head * D + position), tau, LAYOUT)
    tl.store(out + channels, key.to(out_ptr.dtype.element_ty))

    number = tl.arange(0, KEPT_BLOCK)[None, :]
    is_kept = (number < LAYOUT.kept_channels) & (index >= 0)[:, None]
    halves = row.to(tl.pointer_type(tl.uint16))
    word = tl.load(halves + LAYOUT.kept_half + number, mask=is_kept, other=0).to(tl.int32)
    magnitude = (word & ((1 << LAYOUT.magnitude_bits) - 1)).to(tl.float32)
    integer = tl.where(word >> 15 > 0, -magnitude, magnitude)
    position = word >> LAYOUT.magnitude_bits & ((1 << LAYOUT.position_bits) - 1)
    restored = _restored(row, position, tl.load(unit_ptr + head * D + position), tau, LAYOUT)
    key = tl.load(centre_ptr + head * D + position) + (restored + integer * kappa)
    channel = tl.load(order_ptr + head * D + position)
    tl.debug_barrier()
    tl.store(out + channel, key.to(out_ptr.dtype.element_ty), mask=is_kept)


@triton.jit
def _integers(row, channels, LAYOUT: tl.constexpr):
    """Transformed values of the rows at ``row``, float32."""
    scale = load_half(row, LAYOUT.scale_half)
    if LAYOUT.bits == 4:
        return (_code(row, channels, 0, 4).to(tl.float32) - 7.5) * scale
    else:
        code = _code(row, channels, 0, 2) | _code(row, channels, LAYOUT.high_byte, 1) << 2
        return (code.to(tl.float32) - 3.5) * scale


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["slots_ptr"])
def _restore_values(
    rows_ptr,
    slots_ptr,
    out_ptr,
    scale,
    num_slots,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    LAYOUT: tl.constexpr,
    BACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (block of slots, KV head); uint8 is float8 as bits, rows of integers have a ``LAYOUT``.

    The latter are transformed back, and multiplied by ``BACK``, if that is not 0. Also restores keys that are numbers.
    """
    head = tl.program_id(1)
    index = tl.minimum((tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64), num_slots - 1)
    slot = tl.load(slots_ptr + index).to(tl.int64)
    channels = tl.arange(0, D)[None, :]
    row = (slot * NUM_KV_HEADS + head)[:, None]
    if LAYOUT is None:
        numbers = tl.load(rows_ptr + row * D + channels)
        if rows_ptr.dtype.element_ty == tl.uint8:
            numbers = float8_bits_to_half(numbers)
        numbers = numbers.to(tl.float32)
    else:
        numbers = _integers(rows_ptr + row * LAYOUT.row_bytes, channels, LAYOUT)
        if BACK > 0:
            numbers = transform(numbers) * BACK
    out = out_ptr + ((index * NUM_KV_HEADS + head) * D)[:, None] + channels
    tl.store(out, (numbers * scale).to(out_ptr.dtype.element_ty))


def restore_keys(rows: LayerRows, slots: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """See `spark_kernels.reference.restore_keys`; in ``dtype``."""
    made = rows.key_format
    if isinstance(made, Numbers):
        return _restored_numbers(key_rows(rows), slots, made.head_dim, None, 0.0, 1.0, dtype)
    check_head_dim(made.head_dim)
    out = torch.empty(slots.shape[0], rows.num_kv_heads, made.head_dim, dtype=dtype, device=rows.device)
    if slots.shape[0]:
        restoration = rows.restoration
        _restore_keys[(triton.cdiv(slots.shape[0], BLOCK_TOKENS), rows.num_kv_heads)](
            rows.keys,
            slots,
            restoration.order,
            restoration.position,
            restoration.centre,
            restoration.unit,
            out,
            slots.shape[0],
            NUM_KV_HEADS=rows.num_kv_heads,
            LAYOUT=PrunedLayout.of(made),
            KEPT_BLOCK=triton.next_power_of_2(made.kept_channels),
            BLOCK_TOKENS=BLOCK_TOKENS,
            enable_fp_fusion=False,
        )
    return out


def restore_values(
    rows: LayerRows,
    slots: torch.Tensor,
    v_scale: float,
    dtype: torch.dtype = torch.float32,
    *,
    transformed: bool = False,
) -> torch.Tensor:
    """See `spark_kernels.reference.restore_values`; in ``dtype``.

    ``transformed`` leaves integers without the transform back.
    """
    values, factor = value_rows(rows)
    made = rows.value_format
    back = hadamard_scales(made.block)[1] if isinstance(made, Integers) and not transformed else 0.0
    return _restored_numbers(values, slots, made.head_dim, IntegersLayout.of(made), back, v_scale * factor, dtype)


def _restored_numbers(
    numbers: torch.Tensor,
    slots: torch.Tensor,
    head_dim: int,
    layout: IntegersLayout | None,
    back: float,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    num_kv_heads = numbers.shape[1]
    check_head_dim(head_dim)
    out = torch.empty(slots.shape[0], num_kv_heads, head_dim, dtype=dtype, device=numbers.device)
    if slots.shape[0]:
        _restore_values[(triton.cdiv(slots.shape[0], BLOCK_TOKENS), num_kv_heads)](
            numbers,
            slots,
            out,
            scale,
            slots.shape[0],
            NUM_KV_HEADS=num_kv_heads,
            D=head_dim,
            LAYOUT=layout,
            BACK=back,
            BLOCK=BLOCK_TOKENS,
            enable_fp_fusion=False,
        )
    return out
