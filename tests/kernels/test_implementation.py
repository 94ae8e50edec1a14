"""Both implementations are what `Kernels` says, and list slots alike."""

from __future__ import annotations

import inspect

import pytest
import torch

from spark_kernels import cpu, gpu
from spark_kernels.implementation import Kernels

REQUIRED = [name for name, value in vars(Kernels).items() if isinstance(value, staticmethod)]


@pytest.mark.parametrize("kernels", [cpu, gpu], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", REQUIRED)
def test_functions_take_what_the_protocol_passes(name, kernels):
    """They may take more, with defaults."""
    expected = inspect.signature(getattr(Kernels, name)).parameters
    found = inspect.signature(getattr(kernels, name)).parameters
    assert list(expected) == [parameter for parameter in found if parameter in expected]
    assert all(found[parameter].kind is expected[parameter].kind for parameter in expected)
    assert all(found[parameter].default is not inspect.Parameter.empty for parameter in found.keys() - expected.keys())


@pytest.mark.parametrize("kernels", [cpu, gpu], ids=["cpu", "gpu"])
def test_attributes(kernels):
    assert isinstance(kernels.CUDA_GRAPHS, bool) and kernels.SEGMENT_TOKENS > 0
    assert callable(kernels.DecodePlan.build) and callable(kernels.ExtendPlan.build)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[3], [0, 5, 0], [1, 4000, 7, 2500]], ids=str)
def test_slots_stand_end_to_end(lengths, dtype):
    req_to_token = torch.randperm(6 * 4096).int().view(6, 4096)
    requests = torch.randperm(6)[: len(lengths)]
    kv_indptr = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    out = torch.full((sum(lengths) + 2,), -1, dtype=dtype)
    cpu.fill_slots(req_to_token, requests, kv_indptr, out)
    expected = [req_to_token[r, :length] for r, length in zip(requests, lengths, strict=True)]
    assert torch.equal(out, torch.cat([*expected, torch.tensor([-1, -1])]).to(dtype))
