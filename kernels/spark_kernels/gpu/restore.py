"""Rows at a list of slots to dense keys and values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_kernels.gpu.rows import check_head_dim, float8_bits_to_half, value_rows
from spark_kernels.gpu.scores import RowLayout
from spark_kernels.gpu.values import Int4Layout, restore_int4
from spark_kernels.formats import LayerRows

BLOCK_TOKENS = 8


@triton.jit
def _plane(row, channels, plane_scale, LAYOUT: tl.constexpr):
    """The restore plane at ``channels`` of the rows at ``row``."""
    bit_plane = row + LAYOUT.plane_word * 8 + channels // 8
    high = ((tl.load(bit_plane).to(tl.int32) >> (channels % 8)) & 1).to(tl.float32) * 2.0 - 1.0
    if LAYOUT.restore_bits == 1:
        return high * plane_scale
    low = ((tl.load(bit_plane + LAYOUT.head_dim // 8).to(tl.int32) >> (channels % 8)) & 1).to(tl.float32) * 2.0 - 1.0
    return (2.0 * high + low) * (0.25 * plane_scale)


@triton.jit
def _restore_keys(
    rows_ptr,
    slots_ptr,
    out_ptr,
    num_slots,
    NUM_KV_HEADS: tl.constexpr,
    LAYOUT: tl.constexpr,
    KEPT_BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """One program per (block of slots, KV head). Kept channels are written over the restore plane."""
    D: tl.constexpr = LAYOUT.head_dim
    head = tl.program_id(1)
    index = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    # Beyond the end the last slot is restored again, to the same numbers.
    index = tl.minimum(index, num_slots - 1)
    slot = tl.load(slots_ptr + index).to(tl.int64)
    row = (rows_ptr + (slot * NUM_KV_HEADS + head) * (8 * LAYOUT.row_words))[:, None]
    out = (out_ptr + (index * NUM_KV_HEADS + head) * D)[:, None]
    halves = row.to(tl.pointer_type(tl.int16))
    plane_scale = tl.load(halves + LAYOUT.scale_half).to(tl.float16, bitcast=True).to(tl.float32)
    kept_scale = tl.load(halves + LAYOUT.scale_half + 1).to(tl.float16, bitcast=True).to(tl.float32)

    channels = tl.arange(0, D)[None, :]
    plane = tl.zeros([BLOCK_TOKENS, D], tl.float32)
    if LAYOUT.restore_bits > 0:
        plane = _plane(row, channels, plane_scale, LAYOUT)
    tl.store(out + channels, plane.to(out_ptr.dtype.element_ty))

    number = tl.arange(0, KEPT_BLOCK)[None, :]
    is_kept = (number < LAYOUT.kept_channels) & (index >= 0)[:, None]
    word = tl.load(halves + LAYOUT.kept_half + number, mask=is_kept, other=0).to(tl.int32)
    channel = word & (D - 1)
    key = (word >> LAYOUT.index_bits).to(tl.float32) * kept_scale
    if LAYOUT.restore_bits > 0:
        key = _plane(row, channel, plane_scale, LAYOUT) + key
    tl.debug_barrier()
    tl.store(out + channel, key.to(out_ptr.dtype.element_ty), mask=is_kept)


@triton.jit
def _restore_numbers(
    rows_ptr,
    slots_ptr,
    out_ptr,
    scale,
    num_slots,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (block of slots, KV head); uint8 is float8 as bits, int4 rows have a ``V_LAYOUT``."""
    head = tl.program_id(1)
    index = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    exists = index < num_slots
    slot = tl.load(slots_ptr + index, mask=exists, other=0).to(tl.int64)
    channels = tl.arange(0, D)[None, :]
    row = slot * NUM_KV_HEADS + head
    if V_LAYOUT is None:
        numbers = tl.load(rows_ptr + (row * D)[:, None] + channels, mask=exists[:, None])
        if rows_ptr.dtype.element_ty == tl.uint8:
            numbers = float8_bits_to_half(numbers)
    else:
        numbers = restore_int4(rows_ptr, row, exists, V_LAYOUT)
    numbers = numbers.to(tl.float32) * scale
    out = out_ptr + ((index * NUM_KV_HEADS + head) * D)[:, None] + channels
    tl.store(out, numbers.to(out_ptr.dtype.element_ty), mask=exists[:, None])


def restore_keys(rows: LayerRows, slots: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """See `spark_kernels.reference.restore_keys`; in ``dtype``."""
    key_format = rows.key_format
    if key_format.is_raw:
        return _numbers(rows.keys.view(key_format.dtype), slots, key_format.head_dim, None, 1.0, dtype)
    check_head_dim(key_format.head_dim)
    out = torch.empty(slots.shape[0], rows.num_kv_heads, key_format.head_dim, dtype=dtype, device=rows.device)
    if slots.shape[0]:
        _restore_keys[(triton.cdiv(slots.shape[0], BLOCK_TOKENS), rows.num_kv_heads)](
            rows.keys,
            slots,
            out,
            slots.shape[0],
            NUM_KV_HEADS=rows.num_kv_heads,
            LAYOUT=RowLayout.of(key_format),
            KEPT_BLOCK=triton.next_power_of_2(key_format.kept_channels),
            BLOCK_TOKENS=BLOCK_TOKENS,
            enable_fp_fusion=False,
        )
    return out


def restore_values(
    rows: LayerRows, slots: torch.Tensor, v_scale: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """See `spark_kernels.reference.restore_values`; in ``dtype``."""
    values, factor = value_rows(rows)
    layout = Int4Layout.of(rows.value_format) if rows.value_format.is_int4 else None
    return _numbers(values, slots, rows.value_format.head_dim, layout, v_scale * factor, dtype)


def _numbers(
    numbers: torch.Tensor,
    slots: torch.Tensor,
    head_dim: int,
    layout: Int4Layout | None,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    num_kv_heads = numbers.shape[1]
    check_head_dim(head_dim)
    out = torch.empty(slots.shape[0], num_kv_heads, head_dim, dtype=dtype, device=numbers.device)
    if slots.shape[0]:
        _restore_numbers[(triton.cdiv(slots.shape[0], BLOCK_TOKENS), num_kv_heads)](
            numbers,
            slots,
            out,
            scale,
            slots.shape[0],
            NUM_KV_HEADS=num_kv_heads,
            D=head_dim,
            V_LAYOUT=layout,
            BLOCK=BLOCK_TOKENS,
        )
    return out
