"""Attention of new chunks against the reference."""

import math
from itertools import accumulate

import pytest
import torch
from kernel_cases import KEYS, VALUES, Layer, assert_close, assert_lse_close

from spark_kernels import SparkBatchPrefillWrapper, merge_state, reference

PREFIXES = (0, 1, 300, 0, 65, 64, 128, 10)
CHUNKS = (20, 1, 1, 0, 40, 7, 0, 64)


def _check(
    prefix: Layer,
    chunks: tuple[int, ...] = CHUNKS,
    causal: bool = True,
    segment_tokens: int = 64,
    ratio: float = 1e-5,
    **arguments,
) -> None:
    tokens, dtype = sum(chunks), prefix.q.dtype
    q, k, v = (torch.randn(tokens, *x.shape[1:]).to(dtype) for x in (prefix.q, prefix.k, prefix.v))
    qo_indptr = torch.tensor([0, *accumulate(chunks)])
    wrapper = SparkBatchPrefillWrapper("cpu", segment_tokens)
    wrapper.plan(qo_indptr, prefix.indptr, prefix.slots, q.shape[1], k.shape[1], q.shape[2], causal=causal)
    out, lse = wrapper.run(q, k, v, prefix.rows, sm_scale=prefix.sm_scale, return_lse=True, **arguments)
    expected = reference.extend_attention(
        q,
        k,
        v,
        prefix.rows,
        qo_indptr,
        prefix.indptr,
        prefix.slots,
        causal=causal,
        sm_scale=prefix.sm_scale,
        **arguments,
    )
    assert out.dtype == dtype
    assert_close(out, expected[0], ratio)
    assert_lse_close(lse, expected[1], 10 * ratio)


@pytest.mark.parametrize("group", [1, 4, 8], ids="group {}".format)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("keys", KEYS)
def test_equals_reference(keys, head_dim, group):
    _check(Layer.random(keys, head_dim=head_dim, group=group, lengths=PREFIXES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_value_formats_and_dtypes(values, dtype):
    prefix = Layer.random(values=values, lengths=PREFIXES, dtype=dtype, v_scale=0.25)
    _check(prefix, v_scale=0.25, ratio=2e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("logits_soft_cap", [0.0, 1.5], ids=["no cap", "cap"])
@pytest.mark.parametrize("v_head_dim", [128, 64])
def test_variants(causal, logits_soft_cap, v_head_dim):
    prefix = Layer.random(lengths=PREFIXES, v_head_dim=v_head_dim)
    _check(prefix, causal=causal, logits_soft_cap=logits_soft_cap)


def test_sinks():
    prefix = Layer.random(lengths=PREFIXES)
    _check(prefix, sinks=torch.randn(prefix.q.shape[1]) * 3)


@pytest.mark.parametrize("logits_soft_cap", [0.0, 1.5], ids=["no cap", "cap"])
def test_a_long_chunk(logits_soft_cap):
    _check(Layer.random(lengths=(500,)), chunks=(600,), logits_soft_cap=logits_soft_cap)


@pytest.mark.parametrize("segment_tokens", [1, 7, 299, 300, 301, 4096])
def test_segments_of_any_size(segment_tokens):
    _check(Layer.random(lengths=(300, 20)), chunks=(5, 9), segment_tokens=segment_tokens)


def test_float32_rows_are_as_exact_as_dense_attention():
    layer = Layer.random("float32", "float32", lengths=(700,))
    new = slice(600, 700)
    wrapper = SparkBatchPrefillWrapper("cpu", segment_tokens=256)
    wrapper.plan(torch.tensor([0, 100]), torch.tensor([0, 600]), layer.slots, 8, 2, 128)
    out = wrapper.run(layer.q[new], layer.k[new], layer.v[new], layer.rows, sm_scale=layer.sm_scale)
    q, k, v = (x.double().transpose(0, 1) for x in (layer.q[new], layer.k, layer.v))
    mask = torch.ones(100, 700, dtype=torch.bool).tril(600)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=layer.sm_scale, enable_gqa=True
    )
    torch.testing.assert_close(out.double(), dense.transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_strided_inputs_and_spare_indices():
    prefix = Layer.random(lengths=(100,))
    q, k, v = torch.randn(30, 1536).split([1024, 256, 256], dim=1)
    q, k, v = q.view(30, 8, 128), k.view(30, 2, 128), v.view(30, 2, 128)
    spare = torch.cat([prefix.slots, torch.full((9,), 10**6)]).int()
    wrapper = SparkBatchPrefillWrapper("cpu")
    wrapper.plan(torch.tensor([0, 30]).int(), torch.tensor([0, 100]).int(), spare, 8, 2, 128)
    out = torch.empty(30, 16, 128)[:, ::2]
    wrapper.run(q, k, v, prefix.rows, sm_scale=0.1, out=out)
    expected = wrapper.run(q.contiguous(), k.contiguous(), v.contiguous(), prefix.rows, sm_scale=0.1)
    assert torch.equal(out, expected)


def test_no_tokens():
    prefix = Layer.random(lengths=(10,))
    _check(prefix, chunks=(0,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_merge_state_equals_reference(dtype):
    outs = torch.randn(2, 50, 8, 64).to(dtype)
    lses = 10 * torch.randn(2, 50, 8)
    lses[0, :10] = -math.inf
    lses[1, 5:20] = -math.inf
    outs[0, :10] = math.nan
    outs[1, 5:20] = math.nan
    before = outs.clone()
    out, lse = merge_state(outs[0], lses[0], outs[1], lses[1])
    expected = reference.merge_state(outs[0], lses[0], outs[1], lses[1])
    assert out.dtype == dtype and out[5:10].eq(0).all()
    assert_close(out, expected[0], 1e-6 if dtype == torch.float32 else 1e-2)
    assert_lse_close(lse, expected[1], 1e-5)
    torch.testing.assert_close(outs, before, rtol=0, atol=0, equal_nan=True)
