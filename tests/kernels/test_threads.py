"""What running kernels on the CPU leaves behind in the OpenMP runtime that PyTorch uses too."""

import ctypes

import pytest
import torch
from kernel_cases import Layer

from spark_kernels import restore_keys


def test_pytorch_keeps_its_threads_and_does_not_nest_them():
    runtime = ctypes.CDLL(None)
    if not hasattr(runtime, "omp_get_max_active_levels"):
        pytest.skip("PyTorch runs without OpenMP")
    threads = torch.get_num_threads()
    layer = Layer.random()
    restore_keys(layer.rows, layer.slots)
    assert torch.get_num_threads() == threads
    assert runtime.omp_get_max_active_levels() == 1
