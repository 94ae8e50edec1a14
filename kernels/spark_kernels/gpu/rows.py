"""Rows as tensors of numbers, and what the GPU kernels can read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_kernels.formats import LayerRows

HEAD_DIMS = (64, 128, 256)
FLOAT8_BITS_FACTOR = 256.0


@triton.jit
def float8_bits_to_half(bits):
    """float16 of 1/256 of the float8_e4m3fn given as uint8, for GPUs that cannot convert it."""
    wide = bits.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return tl.where((wide & 0x7F) == 0x7F, 0x7E00, half).to(tl.uint16).to(tl.float16, bitcast=True)


def check_head_dim(head_dim: int) -> None:
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"head_dim={head_dim}: the GPU kernels take {', '.join(map(str, HEAD_DIMS))}")


def value_rows(rows: LayerRows) -> tuple[torch.Tensor, float]:
    """Value rows as ``[num_slots, num_kv_heads, head_dim]`` for kernels, and the factor of what they read.

    float8 stays uint8, to be read by `float8_bits_to_half`, where the GPU cannot convert it. int4 rows are
    16-bit words, to be read by `spark_kernels.gpu.values`.
    """
    if rows.value_format.is_int4:
        return rows.values.view(torch.int16), 1.0
    if rows.value_format.dtype == torch.float8_e4m3fn and not _converts_float8(rows.device):
        return rows.values, FLOAT8_BITS_FACTOR
    return rows.values.view(rows.value_format.dtype), 1.0


def _converts_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
