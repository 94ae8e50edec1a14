"""The wrappers over the GPU kernels, and CUDA-graph mode; run by test_gpu_kernels.py."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from kernel_cases import Layer, assert_close, assert_lse_close

from spark_kernels import (
    SparkBatchDecodeWrapper,
    SparkBatchWriteWrapper,
    cpu,
    gpu,
    merge_state,
    reference,
    restore_keys,
    restore_values,
)
from spark_kernels.implementation import implementation

LENGTHS = (70, 0, 5, 140)


@pytest.fixture
def layer() -> Layer:
    return Layer.random("3 bits", "float16", head_dim=64, num_kv_heads=2, group=2, lengths=LENGTHS)


def test_the_gpu_kernels_are_chosen():
    assert implementation(torch.device("cpu")) is gpu is implementation(torch.device("cuda"))


def test_write_and_restore(layer):
    rows = layer.empty_rows()
    wrapper = SparkBatchWriteWrapper("cpu")
    some = layer.slots[:20]
    wrapper.plan(some, torch.tensor([0, 12, 20]))
    wrapper.run(layer.q[:20], layer.k[:20], layer.v[:20], rows)
    expected = layer.empty_rows()
    reference.write_rows(layer.q[:20], layer.k[:20], layer.v[:20], some, expected, qo_indptr=torch.tensor([0, 12, 20]))
    assert torch.equal(rows.keys, expected.keys) and torch.equal(rows.values, expected.values)
    assert torch.equal(restore_keys(rows, some), reference.restore_keys(rows, some))
    assert torch.equal(restore_values(rows, some), reference.restore_values(rows, some))


def test_slots_may_change_after_the_plan(layer):
    """As a replayed graph's do."""
    slots = layer.slots[:3].clone()
    wrapper = SparkBatchWriteWrapper("cpu")
    wrapper.plan(slots)
    slots.copy_(layer.slots[3:6])
    rows = layer.empty_rows()
    wrapper.run(layer.q[:3], layer.k[:3], layer.v[:3], rows)
    assert rows.keys[layer.slots[3:6]].any() and not rows.keys[layer.slots[:3]].any()


def test_merge_state():
    outs, lses = torch.randn(2, 9, 2, 80).half(), torch.randn(2, 9, 2)
    out, lse = merge_state(outs[0], lses[0], outs[1], lses[1])
    expected, expected_lse = reference.merge_state(outs[0], lses[0], outs[1], lses[1])
    assert out.dtype == torch.float16
    assert_close(out, expected, 1e-3)
    assert_lse_close(lse, expected_lse, 1e-5)


def _graph_wrapper(batch: int, most_tokens: int) -> SparkBatchDecodeWrapper:
    return SparkBatchDecodeWrapper(
        "cpu",
        kv_indptr_buffer=torch.zeros(batch + 1, dtype=torch.int32),
        kv_indices_buffer=torch.zeros(most_tokens, dtype=torch.int32),
    )


def _addresses(wrapper: SparkBatchDecodeWrapper) -> list[tuple[int, torch.Size]]:
    tensors = (tensor for tensor in vars(wrapper._plan).values())
    return [(tensor.data_ptr(), tensor.shape) for tensor in tensors]


def test_a_graph_wrapper_planned_again_equals_an_eager_one(layer, monkeypatch):
    """Everything that a captured run reads and every grid stays as it was; what it says follows the plan."""
    monkeypatch.setattr("spark_kernels.gpu.plan._SHORTEST_SPLIT", 32)
    monkeypatch.setattr("spark_kernels.gpu.plan._num_sms", lambda device: 2)
    graph, eager = _graph_wrapper(3, 400), SparkBatchDecodeWrapper("cpu")
    addresses = None
    for lengths in ((1, 1, 1), (60, 0, 140), (3, 33, 65), (0, 0, 0), (200, 1, 1)):
        indptr = torch.tensor([0, *accumulate(lengths)])
        slots = layer.slots[torch.randint(0, len(layer.slots), (sum(lengths),))]
        q = torch.randn(3, 4, 64)
        results = []
        for wrapper in (graph, eager):
            wrapper.plan(indptr, slots, 4, 2, 64)
            results.append(wrapper.run(q, layer.rows, sm_scale=layer.sm_scale, return_lse=True))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        expected = reference.decode_attention(q, layer.rows, indptr, slots, sm_scale=layer.sm_scale)
        assert_close(results[0][0], expected[0], 5e-4)
        assert_lse_close(results[0][1], expected[1], 2e-3)
        assert addresses in (None, _addresses(graph))
        addresses = _addresses(graph)


def test_padding_requests_change_nothing(layer):
    """SGLang fills a batch with requests of one token at slot 0."""
    graph = _graph_wrapper(4, 200)
    indptr, slots = torch.tensor([0, 30, 100]), layer.slots[:100]
    q = torch.randn(2, 4, 64)
    expected = reference.decode_attention(q, layer.rows, indptr, slots, sm_scale=0.1)[0]
    padded = torch.cat([indptr, torch.tensor([101, 102])])
    graph.plan(padded, torch.cat([slots, torch.zeros(2, dtype=torch.int64)]), 4, 2, 64)
    out = graph.run(torch.cat([q, torch.zeros(2, 4, 64)]), layer.rows, sm_scale=0.1)
    assert_close(out[:2], expected, 5e-4)


def test_buffers_given_back_are_not_copied(layer):
    indptr = torch.tensor([0, 30], dtype=torch.int32)
    slots = layer.slots.int()
    wrapper = SparkBatchDecodeWrapper("cpu", kv_indptr_buffer=indptr, kv_indices_buffer=slots)
    wrapper.plan(indptr, slots, 4, 2, 64)
    q = torch.randn(1, 4, 64)
    first = wrapper.run(q, layer.rows, sm_scale=0.1)
    assert wrapper._plan.kv_indices.data_ptr() == slots.data_ptr()
    slots.copy_(slots.flip(0))
    assert not torch.equal(wrapper.run(q, layer.rows, sm_scale=0.1), first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_indptr": torch.tensor([0, 1])}, "kv_indptr_buffer is for 2 requests, kv_indptr has 1"),
        ({"kv_indices": torch.zeros(51, dtype=torch.int32)}, "kv_indices_buffer holds 50 slots, got 51"),
        ({"num_qo_heads": 8}, r"are fixed at \(2, 4, 2, 64\), got \(2, 8, 2, 64\)"),
    ],
)
def test_what_a_graph_wrapper_cannot_hold_is_refused(changes, message):
    wrapper = _graph_wrapper(2, 50)
    given = {"kv_indptr": torch.tensor([0, 1, 2]), "kv_indices": torch.zeros(2, dtype=torch.int32)}
    given |= {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64}
    wrapper.plan(**given)
    with pytest.raises(ValueError, match=message):
        wrapper.plan(**given | changes)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[3], [0, 5, 0], [1, 40_000, 7]], ids=str)
def test_slots_are_listed_as_on_the_cpu(lengths, dtype):
    req_to_token = torch.randperm(4 * 40_000).int().view(4, 40_000)
    requests = torch.randperm(4)[: len(lengths)]
    kv_indptr = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    listed = [torch.full((sum(lengths) + 2,), -1, dtype=dtype) for _ in range(2)]
    gpu.fill_slots(req_to_token, requests, kv_indptr, listed[0])
    cpu.fill_slots(req_to_token, requests, kv_indptr, listed[1])
    assert torch.equal(*listed)
