"""Attention of new chunks by the GPU kernels against the reference; run by test_gpu_kernels.py."""

import math
import sys
from itertools import accumulate
from types import ModuleType

import pytest
import torch
from kernel_cases import Layer, assert_close, assert_lse_close

from spark_kernels import SparkBatchPrefillWrapper, reference
from spark_kernels.gpu import dense_flashinfer, short_chunks
from spark_kernels.gpu.dense import pieces
from spark_kernels.gpu.restore import restore_keys

PREFIXES = (0, 1, 40, 0, 65, 64, 20)
CHUNKS = (10, 1, 3, 0, 20, 0, 7)


@pytest.fixture(autouse=True)
def _no_chunk_is_short(monkeypatch):
    monkeypatch.setattr(short_chunks, "MOST_TOKENS", 0)


def _check(prefix: Layer, chunks=CHUNKS, causal=True, segment_tokens=64, ratio=1e-5, **arguments) -> None:
    tokens, dtype = sum(chunks), prefix.q.dtype
    q, k, v = (torch.randn(tokens, *x.shape[1:]).to(dtype) for x in (prefix.q, prefix.k, prefix.v))
    qo_indptr = torch.tensor([0, *accumulate(chunks)])
    wrapper = SparkBatchPrefillWrapper("cpu", segment_tokens)
    wrapper.plan(qo_indptr, prefix.indptr, prefix.slots, q.shape[1], k.shape[1], q.shape[2], causal=causal)
    arguments["sm_scale"] = prefix.sm_scale
    out, lse = wrapper.run(q, k, v, prefix.rows, return_lse=True, **arguments)
    expected, expected_lse = reference.extend_attention(
        q, k, v, prefix.rows, qo_indptr, prefix.indptr, prefix.slots, causal=causal, **arguments
    )
    assert out.dtype == dtype
    assert_close(out, expected, ratio)
    assert_lse_close(lse, expected_lse, 10 * ratio)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("keys", ["3 bits", "float32"])
def test_equals_reference(keys, head_dim):
    _check(Layer.random(keys, head_dim=head_dim, num_kv_heads=1, lengths=PREFIXES))


@pytest.mark.parametrize("group", [1, 3, 8, 16])
def test_groups(group):
    _check(Layer.random(group=group, head_dim=64, num_kv_heads=1, lengths=(9, 0, 30)), chunks=(12, 3, 1))


@pytest.mark.parametrize("values", ["float16", "float8_e4m3fn", "int4", "int3"])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)], ids=str)
def test_halves(values, dtype, ratio):
    prefix = Layer.random(values=values, num_kv_heads=1, lengths=PREFIXES, dtype=dtype, v_scale=0.25)
    _check(prefix, v_scale=0.25, ratio=ratio)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("logits_soft_cap", [0.0, 1.5], ids=["no cap", "cap"])
@pytest.mark.parametrize("v_head_dim", [128, 64])
def test_variants(causal, logits_soft_cap, v_head_dim):
    prefix = Layer.random(lengths=PREFIXES, num_kv_heads=1, v_head_dim=v_head_dim)
    _check(prefix, causal=causal, logits_soft_cap=logits_soft_cap)


@pytest.mark.parametrize("values", ["float16", "int4"])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_short_chunks_read_rows(values, most, monkeypatch):
    """Some of them, or all; as exact as decode is."""
    monkeypatch.setattr(short_chunks, "MOST_TOKENS", most)
    restored = []
    monkeypatch.setattr("spark_kernels.gpu.extend.restore_keys", _counted(restore_keys, restored))
    prefix = Layer.random(values=values, lengths=PREFIXES, dtype=torch.float16, v_scale=0.25)
    _check(prefix, v_scale=0.25, ratio=2e-3, logits_soft_cap=1.5)
    assert sum(restored) == sum(p for p, c in zip(PREFIXES, CHUNKS, strict=True) if c > most or c == 0)


def _counted(function, counts):
    def counted(rows, slots, *arguments, **options):
        counts.append(len(slots))
        return function(rows, slots, *arguments, **options)

    return counted


def test_a_short_chunk_after_a_long_prefix_is_split(monkeypatch):
    monkeypatch.setattr(short_chunks, "MOST_TOKENS", 8)
    monkeypatch.setattr("spark_kernels.gpu.plan._num_sms", lambda device: 132)
    _check(Layer.random(values="int4", lengths=(700,), dtype=torch.bfloat16), chunks=(2,), ratio=1e-2)


@pytest.mark.parametrize("segment_tokens", [1, 7, 29, 30, 31, 4096])
def test_segments_of_any_size(segment_tokens):
    _check(Layer.random(num_kv_heads=1, lengths=(30, 5)), chunks=(5, 9), segment_tokens=segment_tokens)


def test_restored_numbers_beyond_float16_stay_finite():
    prefix = Layer.random("3 bits", "float32", num_kv_heads=1, lengths=(8,), dtype=torch.float32)
    prefix.k[:, :, 3] = 65504.0
    prefix.v[:, :, 3] = 70000.0
    reference.write_rows(prefix.q, prefix.k, prefix.v, prefix.slots, prefix.rows)
    q, k, v = (torch.zeros(2, *x.shape[1:], dtype=torch.float16) for x in (prefix.q, prefix.k, prefix.v))
    wrapper = SparkBatchPrefillWrapper("cpu")
    wrapper.plan(torch.tensor([0, 2]), prefix.indptr, prefix.slots, 4, 1, 128)
    assert wrapper.run(q, k, v, prefix.rows, sm_scale=0.1).isfinite().all()


def test_strided_inputs_and_int32_indices():
    prefix = Layer.random(lengths=(50,))
    q, k, v = (x.view(30, -1, 128) for x in torch.randn(30, 1536).split([1024, 256, 256], dim=1))
    wrapper = SparkBatchPrefillWrapper("cpu")
    wrapper.plan(torch.tensor([0, 30]), prefix.indptr.int(), prefix.slots.int(), 8, 2, 128)
    out = wrapper.run(q, k, v, prefix.rows, sm_scale=0.1)
    expected = wrapper.run(q.contiguous(), k.contiguous(), v.contiguous(), prefix.rows, sm_scale=0.1)
    assert torch.equal(out, expected)


def test_no_tokens():
    _check(Layer.random(lengths=(10,)), chunks=(0,))


def test_pieces_of_a_ragged_batch():
    bounds = [0, 0, 5, 5, 12, 20]
    assert pieces(bounds, 0, 4) == (1, 2, [0, 4])
    assert pieces(bounds, 4, 13) == (1, 5, [0, 1, 1, 8, 9])
    assert pieces(bounds, 5, 12) == (3, 4, [0, 7])


class FlashInferWrapper:
    """What `spark_kernels.gpu.dense_flashinfer` asks of FlashInfer, in PyTorch: its plan, and its lse to base 2."""

    def __init__(self, workspace: torch.Tensor, layout: str) -> None:
        assert layout == "NHD" and workspace.dtype == torch.uint8
        self.plans = 0

    def plan(self, qo_indptr, kv_indptr, *shape, **settings) -> None:
        self.plans += 1
        assert all(x.device.type == "cpu" and x.dtype == torch.int32 for x in (qo_indptr, kv_indptr))
        self.spans = [(qo_indptr[i : i + 2].tolist(), kv_indptr[i : i + 2].tolist()) for i in range(len(qo_indptr) - 1)]
        self.shape, self.settings = shape, settings

    def run(self, q, k, v, return_lse):
        assert self.shape == (q.shape[1], k.shape[1], q.shape[2]) and self.settings["q_data_type"] == q.dtype
        out, lse = torch.zeros_like(q), torch.full(q.shape[:2], -5e4)
        for (a, b), (c, d) in self.spans:
            if a < b and c < d:
                mask = torch.ones(b - a, d - c, dtype=torch.bool)
                mask = mask.tril(d - c - b + a) if self.settings["causal"] else mask
                settings = {name: self.settings[name] for name in ("sm_scale", "logits_soft_cap")}
                out[a:b], natural = reference.dense_attention(q[a:b], k[c:d], v[c:d], mask=mask, **settings)
                lse[a:b] = natural / math.log(2.0)
        return out, lse


@pytest.fixture
def flashinfer(monkeypatch) -> list[FlashInferWrapper]:
    """FlashInfer as far as `FlashInferWrapper` is it, and nothing else; the wrappers made are listed."""
    made = []
    module = ModuleType("flashinfer")
    module.BatchPrefillWithRaggedKVCacheWrapper = lambda *arguments: (
        made.append(FlashInferWrapper(*arguments)) or made[-1]
    )
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr("spark_kernels.gpu.dense_flashinfer._WORKSPACE_BYTES", 16)
    monkeypatch.setattr("spark_kernels.gpu.dense_flashinfer.serves", lambda q, v: True)
    monkeypatch.setattr("spark_kernels.gpu.dense._attend", None)
    return made


@pytest.mark.parametrize("logits_soft_cap", [0.0, 1.5], ids=["no cap", "cap"])
def test_flashinfer_takes_the_place_of_the_kernel(logits_soft_cap, flashinfer):
    _check(Layer.random(group=2, lengths=PREFIXES), logits_soft_cap=logits_soft_cap)
    # The chunks, and three segments.
    assert len(flashinfer) == 4


def test_flashinfer_is_planned_once_a_step_and_kept_from_step_to_step(flashinfer):
    prefix = Layer.random(group=2, lengths=(40,))
    q, k, v = prefix.q[:6], prefix.k[:6], prefix.v[:6]
    wrapper = SparkBatchPrefillWrapper("cpu", 16)
    for step, length in enumerate((40, 10, 40), start=1):
        wrapper.plan(torch.tensor([0, 6]), torch.tensor([0, length]), prefix.slots, 4, 2, 128)
        outs = [wrapper.run(q, k, v, prefix.rows, sm_scale=0.1) for _ in range(2)]
        assert torch.equal(*outs) and flashinfer[0].plans == step
    assert len(flashinfer) == 4
    wrapper.run(q, k, v, prefix.rows, sm_scale=0.2)
    assert flashinfer[0].plans == 4


def test_flashinfer_that_does_not_build_is_left_out_with_a_warning(monkeypatch, caplog):
    def fails(*arguments):
        raise RuntimeError("ninja: no compiler")

    module = ModuleType("flashinfer")
    module.BatchPrefillWithRaggedKVCacheWrapper = fails
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(dense_flashinfer, "_WORKSPACE_BYTES", 16)
    monkeypatch.setattr(dense_flashinfer, "_has_worked", False)
    monkeypatch.setattr(dense_flashinfer, "_has_failed", False)
    monkeypatch.setattr(dense_flashinfer, "serves", lambda q, v: not dense_flashinfer._has_failed)
    _check(Layer.random(group=2, lengths=PREFIXES))
    (record,) = caplog.records
    assert "FlashInfer is installed but does not work here (RuntimeError: ninja: no compiler)" in record.message


def test_flashinfer_that_has_worked_may_not_fail_silently(monkeypatch):
    monkeypatch.setattr(dense_flashinfer, "_has_worked", False)
    with dense_flashinfer.may_fail_at_first():
        pass
    with pytest.raises(RuntimeError, match="out of memory"), dense_flashinfer.may_fail_at_first():
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("head_dim", [80])
def test_head_dims_that_the_kernels_lack_are_refused(head_dim):
    with pytest.raises(NotImplementedError, match=f"head_dim={head_dim}"):
        _check(Layer.random(head_dim=head_dim, lengths=(5,)), chunks=(3,))
