"""Rows as the GPU kernels take them: formats as compile-time constants, and which they can read."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spark_kernels.formats import WIDTHS, Integers, Numbers, Pruned
from spark_kernels.rows import LayerRows

HEAD_DIMS = (64, 128, 256)
FLOAT8_BITS_FACTOR = 256.0


class PrunedLayout(NamedTuple):
    """A `Pruned` format: ``first_w`` is the first byte of the plane of w bits, ``count_w`` its channels."""

    head_dim: int
    row_bytes: int
    count_4: int
    count_2: int
    count_1: int
    first_2: int
    first_1: int
    scale_half: int
    kept_half: int
    kept_channels: int
    magnitude_bits: int
    position_bits: int

    @classmethod
    def of(cls, made: Pruned | Numbers) -> PrunedLayout | None:
        """None for rows of numbers."""
        if isinstance(made, Numbers):
            return None
        count_4, count_2, count_1, _ = made.profile
        return cls(
            head_dim=made.head_dim,
            row_bytes=made.row_bytes,
            count_4=count_4,
            count_2=count_2,
            count_1=count_1,
            first_2=count_4 * WIDTHS[0] // 8,
            first_1=(count_4 * WIDTHS[0] + count_2 * WIDTHS[1]) // 8,
            scale_half=made.scale_offset // 2,
            kept_half=made.kept_offset // 2,
            kept_channels=made.kept_channels,
            magnitude_bits=made.magnitude_bits,
            position_bits=made.position_bits,
        )


class IntegersLayout(NamedTuple):
    """An `Integers` format; 3 bits are a plane of the lower 2 and, from byte ``high_byte`` on, one of the highest."""

    head_dim: int
    bits: int
    row_bytes: int
    high_byte: int
    scale_half: int

    @classmethod
    def of(cls, made: Integers | Numbers) -> IntegersLayout | None:
        """None for rows of numbers."""
        if isinstance(made, Numbers):
            return None
        return cls(made.head_dim, made.bits, made.row_bytes, made.planes[-1].offset, made.scale_offset // 2)


@triton.jit
def float8_bits_to_half(bits):
    """float16 of 1/256 of the float8_e4m3fn given as uint8, for GPUs that cannot convert it."""
    wide = bits.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return tl.where((wide & 0x7F) == 0x7F, 0x7E00, half).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def load_half(row, i: tl.constexpr):
    """float32 of the i-th float16 of the rows at ``row``, pointers to bytes."""
    return tl.load(row.to(tl.pointer_type(tl.float16)) + i).to(tl.float32)


def check_head_dim(head_dim: int) -> None:
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"head_dim={head_dim}: the GPU kernels take {', '.join(map(str, HEAD_DIMS))}")


def key_rows(rows: LayerRows) -> torch.Tensor:
    """Key rows as numbers, or as bytes if they are pruned."""
    return rows.keys.view(rows.key_format.dtype) if isinstance(rows.key_format, Numbers) else rows.keys


def value_rows(rows: LayerRows) -> tuple[torch.Tensor, float]:
    """Value rows as numbers or, of integers, as bytes, and the factor of what kernels read.

    float8 stays uint8, to be read by `float8_bits_to_half`, where the GPU cannot convert it.
    """
    made = rows.value_format
    if isinstance(made, Integers):
        return rows.values, 1.0
    if made.dtype == torch.float8_e4m3fn and not _converts_float8(rows.device):
        return rows.values, FLOAT8_BITS_FACTOR
    return rows.values.view(made.dtype), 1.0


def _converts_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
