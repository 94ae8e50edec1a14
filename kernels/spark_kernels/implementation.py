"""Which kernels serve a device."""

from __future__ import annotations

from types import ModuleType

import torch
from triton import knobs


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels take tensors of ``device``."""
    # PyTorch calls AMD's GPUs cuda too.
    return device.type == "cuda" or (device.type == "cpu" and knobs.runtime.interpret)


def implementation(device: torch.device) -> ModuleType:
    """The kernels for a device. This is the only place that chooses.

    On GPUs they are Triton's, and on the CPU numba's, unless Triton interprets its kernels (``TRITON_INTERPRET=1``):
    then everything can run through them without a GPU.

    Raises
    ------
    NotImplementedError
        There are none for this device.
    """
    if runs_triton(device):
        from spark_kernels import gpu

        return gpu
    if device.type == "cpu":
        from spark_kernels import cpu

        return cpu
    raise NotImplementedError(f"spark_kernels has no kernels for device {device}: use cpu or cuda")
