"""What the wrappers refuse, and how they say it."""

import pytest
import torch
from kernel_cases import Layer

from spark_kernels import (
    LayerRows,
    SparkBatchDecodeWrapper,
    SparkBatchPrefillWrapper,
    SparkBatchWriteWrapper,
    merge_state,
    restore_keys,
    restore_values,
    write_rows,
)


@pytest.fixture
def layer() -> Layer:
    return Layer.random(lengths=(20, 30))


def _decode(layer: Layer, *, plan: dict | None = None, run: dict | None = None) -> None:
    wrapper = SparkBatchDecodeWrapper("cpu")
    planned = {"kv_indptr": layer.indptr, "kv_indices": layer.slots, "num_qo_heads": 8, "num_kv_heads": 2}
    wrapper.plan(**planned | {"head_dim": 128} | (plan or {}))
    wrapper.run(**{"q": torch.randn(2, 8, 128), "rows": layer.rows, "sm_scale": 0.1} | (run or {}))


def _prefill(layer: Layer, *, plan: dict | None = None, run: dict | None = None) -> None:
    wrapper = SparkBatchPrefillWrapper("cpu")
    planned = {"qo_indptr": torch.tensor([0, 4, 9]), "prefix_indptr": layer.indptr, "prefix_indices": layer.slots}
    wrapper.plan(**planned | {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 128} | (plan or {}))
    given = {"q": layer.q[:9], "k": layer.k[:9], "v": layer.v[:9], "rows": layer.rows, "sm_scale": 0.1}
    wrapper.run(**given | (run or {}))


def _write(layer: Layer, **changes) -> None:
    write_rows(**{"q": layer.q, "k": layer.k, "v": layer.v, "slots": layer.slots, "rows": layer.rows} | changes)


CASES = {
    "q shape": (lambda x: _decode(x, run={"q": torch.randn(2, 8, 64)}), r"q must have shape \[2, 8, 128\], got"),
    "q dtype": (lambda x: _decode(x, run={"q": torch.zeros(2, 8, 128).long()}), "q must be torch.bfloat16 or .*int64"),
    "out shape": (lambda x: _decode(x, run={"out": torch.zeros(2, 8, 64)}), r"out must have shape \[2, 8, 128\]"),
    "out dtype": (lambda x: _decode(x, run={"out": torch.zeros(2, 8, 128).half()}), "out must be torch.float32"),
    "heads": (lambda x: _decode(x, plan={"num_qo_heads": 7}), "num_qo_heads=7 must be a positive multiple of"),
    "rows' heads": (
        lambda x: _decode(x, plan={"num_kv_heads": 4}),
        "rows have 2 KV heads of head_dim 128, the plan has 4 of 128",
    ),
    "indptr dtype": (lambda x: _decode(x, plan={"kv_indptr": torch.zeros(3)}), "kv_indptr must be int32 or int64"),
    "indptr start": (
        lambda x: _decode(x, plan={"kv_indptr": torch.tensor([1, 2, 3])}),
        r"kv_indptr must start at 0 and not decrease, got \[1, 2, 3\]",
    ),
    "indptr order": (
        lambda x: _decode(x, plan={"kv_indptr": torch.tensor([0, 9, 3])}),
        "kv_indptr must start at 0 and not decrease",
    ),
    "too few indices": (
        lambda x: _decode(x, plan={"kv_indices": x.slots[:40]}),
        "kv_indices must be int32 or int64 with at least 50 entries",
    ),
    "index too large": (
        lambda x: _decode(x, plan={"kv_indices": x.slots + 10}),
        r"kv_indices must lie in 0 .. 56, got .* .. 6\d",
    ),
    "index negative": (lambda x: _decode(x, plan={"kv_indices": x.slots - 57}), "kv_indices must lie in 0 .. 56"),
    "indptr lengths": (
        lambda x: _prefill(x, plan={"qo_indptr": torch.tensor([0, 9])}),
        "qo_indptr and prefix_indptr must have one length, got 2 and 3",
    ),
    "prefix index": (
        lambda x: _prefill(x, plan={"prefix_indices": x.slots + 100}),
        "prefix_indices must lie in 0 .. 56",
    ),
    "k shape": (lambda x: _prefill(x, run={"k": x.k[:8]}), r"k must have shape \[9, 2, 128\], got \[8, 2, 128\]"),
    "v dtype": (lambda x: _prefill(x, run={"v": x.v[:9].half()}), "v must be torch.float32, got torch.float16"),
    "segment_tokens": (lambda x: SparkBatchPrefillWrapper("cpu", 0), "segment_tokens=0 must be positive"),
    "write k": (lambda x: _write(x, k=x.k[..., :64]), r"k must have shape \[50, 2, 128\], got \[50, 2, 64\]"),
    "write v": (lambda x: _write(x, v=x.v[:9]), r"v must have shape \[50, 2, 128\]"),
    "write q": (lambda x: _write(x, q=x.q[:9]), r"q must have shape \[50, 8, 128\]"),
    "write heads": (lambda x: _write(x, q=x.q[:, :7]), "num_qo_heads=7 must be a positive multiple"),
    "write slots": (lambda x: _write(x, slots=x.slots + 10), "slots must lie in 0 .. 56"),
    "write few slots": (lambda x: _write(x, slots=x.slots[:9]), r"k must have shape \[9, 2, 128\], got \[50, 2, 128\]"),
    "slots' dtype": (lambda x: _write(x, slots=x.slots.float()), "slots must be int32 or int64"),
    "write indptr": (
        lambda x: _write(x, qo_indptr=torch.tensor([0, 20])),
        "qo_indptr must end at the number of tokens 50, got 20",
    ),
    "window": (lambda x: _write(x, window=0), "window=0 must be positive"),
    "restore keys": (lambda x: restore_keys(x.rows, torch.tensor([57])), "slots must lie in 0 .. 56, got 57 .. 57"),
    "restore values": (lambda x: restore_values(x.rows, torch.tensor([-1])), "slots must lie in 0 .. 56, got -1 .. -1"),
    "merge": (
        lambda x: merge_state(x.q, x.q[..., 0], x.q, x.q[:9, :, 0]),
        r"lse_b must have shape \[50, 8\], got \[9, 8\]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_name_the_argument(layer, name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call(layer)


@pytest.mark.parametrize("wrapper", [SparkBatchDecodeWrapper, SparkBatchPrefillWrapper, SparkBatchWriteWrapper])
def test_other_devices_are_refused_by_name(wrapper):
    with pytest.raises(NotImplementedError, match="no kernels for device xpu:1: use cpu or cuda"):
        wrapper("xpu:1")


def test_cuda_graph_buffers_are_refused_without_cuda_graphs():
    indptr, indices = torch.zeros(3, dtype=torch.int32), torch.zeros(9, dtype=torch.int32)
    with pytest.raises(ValueError, match="kv_indptr_buffer and kv_indices_buffer belong together"):
        SparkBatchDecodeWrapper("cpu", kv_indptr_buffer=indptr)
    with pytest.raises(NotImplementedError, match="no CUDA graphs on device cpu"):
        SparkBatchDecodeWrapper("cpu", kv_indptr_buffer=indptr, kv_indices_buffer=indices)


def test_run_needs_a_plan(layer):
    with pytest.raises(RuntimeError, match="plan\\(\\) must be called before run\\(\\)"):
        SparkBatchDecodeWrapper("cpu").run(layer.q, layer.rows, sm_scale=0.1)
    with pytest.raises(RuntimeError, match="plan\\(\\) must be called before run\\(\\)"):
        SparkBatchWriteWrapper("cpu").run(layer.q, layer.k, layer.v, layer.rows)


def test_slots_are_looked_at_once_for_all_layers(layer, monkeypatch):
    wrapper = SparkBatchWriteWrapper("cpu")
    wrapper.plan(layer.slots, layer.indptr)
    monkeypatch.setattr(torch, "aminmax", None)
    for _ in range(2):
        wrapper.run(layer.q, layer.k, layer.v, layer.rows)
    small = LayerRows.allocate(20, 2, layer.rows.key_format, layer.rows.value_format, layer.rows.calibration)
    with pytest.raises(ValueError, match=r"slots must lie in 0 \.\. 19"):
        wrapper.run(layer.q, layer.k, layer.v, small)


def test_a_wrapper_can_be_planned_again(layer):
    wrapper = SparkBatchDecodeWrapper("cpu")
    q = torch.randn(2, 8, 128)
    for _ in range(2):
        wrapper.plan(layer.indptr, layer.slots, 8, 2, 128)
        first = wrapper.run(q, layer.rows, sm_scale=0.1)
        wrapper.plan(layer.indptr[:2], layer.slots, 8, 2, 128)
        assert torch.equal(wrapper.run(q[:1], layer.rows, sm_scale=0.1), first[:1])
