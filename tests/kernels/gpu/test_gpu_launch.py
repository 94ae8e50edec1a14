"""What the host code hands to Triton is what the kernels take: every launch is bound and compiled, none is run."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import PRUNED, Layer
from stub_driver import MAX_SHARED_BYTES, StubDriver
from triton.runtime import driver

from spark_kernels import gpu

ARCHS = (80, 90, 100)


@pytest.fixture
def device(request, monkeypatch) -> StubDriver:
    stub = StubDriver(getattr(request, "param", 90))
    monkeypatch.setattr(driver, "_active", stub)
    # On this GPU; tensors are on the CPU all the same.
    monkeypatch.setattr("spark_kernels.gpu.rows._converts_float8", lambda device: stub.arch >= 89)
    return stub


def _kernels(device: StubDriver) -> list[str]:
    """Names of the kernels launched, after a look at what they need."""
    for launch in device.launches:
        assert launch.shared_bytes <= MAX_SHARED_BYTES[device.arch] and launch.spill_bytes == 0, launch
    return [launch.kernel for launch in device.launches]


def _decode(keys: str, values: str, **shape) -> None:
    layer = Layer.random(keys, values, lengths=(40, 30), dtype=torch.bfloat16, **shape)
    plan = gpu.DecodePlan.build(layer.indptr.int(), layer.slots, 2)
    q = torch.randn(2, *layer.q.shape[1:]).bfloat16()
    gpu.decode_attention(q, layer.rows, plan, sm_scale=0.1, logits_soft_cap=0.0, v_scale=1.0)


def _extend(dtype: torch.dtype, **shape) -> None:
    layer = Layer.random(lengths=(20, 0), dtype=dtype, **shape)
    q, k, v = layer.q[:16], layer.k[:16], layer.v[:16]
    plan = gpu.ExtendPlan.build(torch.tensor([0, 12, 16]), layer.indptr, layer.slots, True, 16)
    gpu.extend_attention(q, k, v, layer.rows, plan, sm_scale=0.1, logits_soft_cap=0.0, v_scale=1.0)


@pytest.mark.parametrize("device", ARCHS, indirect=True, ids="sm_{}".format)
@pytest.mark.parametrize("values", ["bfloat16", "float8_e4m3fn", "int4", "int3"])
def test_decode_on_every_gpu(device, values):
    _decode("3 bits", values)
    assert _kernels(device) == ["_plan_splits", "_prepare_queries", "_decode_split", "_merge_splits"]


@pytest.mark.parametrize(
    "shape",
    [
        {"group": 3},
        {"head_dim": 64},
        pytest.param({"group": 1}, marks=pytest.mark.slow),
        pytest.param({"group": 16}, marks=pytest.mark.slow),
        pytest.param({"v_head_dim": 64}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_decode_shapes(device, shape):
    _decode("3 bits", "bfloat16", **shape)
    assert len(_kernels(device)) == 4


@pytest.mark.parametrize("keys", ["all widths", "0 bits", "bfloat16"])
def test_decode_formats(device, keys):
    _decode(keys, "bfloat16")
    assert "_decode_split" in _kernels(device)


@pytest.mark.parametrize("keys", ["3 bits", "all widths", "0 bits", "bfloat16"])
@pytest.mark.parametrize("values", ["bfloat16", "float8_e4m3fn", "int4", "int3"])
def test_write(device, keys, values):
    layer = Layer.random(keys, values, lengths=(10, 7), dtype=torch.bfloat16)
    tokens = (layer.q, layer.k, layer.v, layer.slots, layer.rows)
    gpu.write_rows(*tokens, qo_indptr=None, window=32, v_scale=1.0)
    assert _kernels(device) == ["_write_rows"]
    gpu.write_rows(*tokens, qo_indptr=layer.indptr.int(), window=32, v_scale=0.5)
    assert _kernels(device)[-1] == "_write_rows" and ("_window_squares" in _kernels(device)) == (keys in PRUNED)


@pytest.mark.parametrize("device", ARCHS, indirect=True, ids="sm_{}".format)
def test_extend_on_every_gpu(device):
    _extend(torch.bfloat16)
    segment = ["_restore_keys", "_restore_values", "_ragged_attention"]
    assert _kernels(device) == ["_ragged_attention", *segment, *segment, "_merge_state", "_merge_state"]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float16, {"head_dim": 64}),
        (torch.float16, {"head_dim": 256}),
        (torch.float32, {"v_head_dim": 64}),
        pytest.param(torch.float16, {"group": 3}, marks=pytest.mark.slow),
        pytest.param(torch.float32, {"head_dim": 256}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_extend_shapes(device, dtype, shape):
    _extend(dtype, **shape)
    assert "_ragged_attention" in _kernels(device)


@pytest.mark.parametrize("keys", ["all widths", "bfloat16", "float32"])
def test_restore(device, keys):
    layer = Layer.random(keys, "float8_e4m3fn", lengths=(9,))
    gpu.restore_keys(layer.rows, layer.slots, torch.bfloat16)
    gpu.restore_values(layer.rows, layer.slots.int(), 0.5, torch.bfloat16)
    assert len(_kernels(device)) == 2


def test_merge_state(device):
    out, lse = torch.randn(9, 4, 80).bfloat16(), torch.randn(9, 4)
    gpu.merge_state(out, lse, out, lse)
    assert _kernels(device) == ["_merge_state"]
