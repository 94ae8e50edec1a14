"""Decode attention of the GPU kernels against the reference; run by test_gpu_kernels.py."""

import math
from itertools import product

import pytest
import torch
from kernel_cases import PRUNED, Layer, assert_close, assert_lse_close

from spark_kernels import gpu, reference

# Queries are rounded to float16, weights to the dtype of the values.
TOLERANCE = 5e-4
LENGTHS = (0, 1, 130, 0, 33)


def _decode(layer: Layer, q: torch.Tensor, logits_soft_cap: float = 0.0, v_scale: float = 1.0, size: float = 1.0):
    plan = gpu.DecodePlan.build(layer.indptr, layer.slots, layer.rows.num_kv_heads)
    arguments = {"sm_scale": layer.sm_scale / size, "logits_soft_cap": logits_soft_cap, "v_scale": v_scale}
    actual = gpu.decode_attention(q, layer.rows, plan, **arguments)
    return actual, reference.decode_attention(q, layer.rows, layer.indptr, layer.slots, **arguments)


def _check(layer: Layer, dtype: torch.dtype = torch.float32, tolerance: float = TOLERANCE, **arguments) -> None:
    q = torch.randn(layer.batch, *layer.q.shape[1:]).to(dtype)
    (out, lse), (expected, expected_lse) = _decode(layer, q, **arguments)
    assert out.dtype == dtype
    assert_close(out, expected, 4e-3 if dtype == torch.bfloat16 else tolerance)
    assert_lse_close(lse, expected_lse, 4 * tolerance)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("keys", [*PRUNED, "float16", "float32"])
def test_equals_reference(keys, head_dim):
    _check(Layer.random(keys, "float16", head_dim=head_dim, num_kv_heads=1, lengths=LENGTHS))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_numbers(head_dim):
    """Queries and weights are rounded to bfloat16, too."""
    _check(Layer.random("bfloat16", "bfloat16", head_dim=head_dim, lengths=LENGTHS), tolerance=4e-3)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8, 9, 16])
@pytest.mark.parametrize("keys", ["3 bits", "float16"])
def test_groups(keys, group):
    _check(Layer.random(keys, "float16", head_dim=64, group=group, num_kv_heads=2, lengths=(40,)))


@pytest.mark.parametrize(
    ("values", "v_head_dim"),
    [*product(("float16", "float32", "float8_e4m3fn"), (64, 256)), *product(("int4", "int3"), (64, 128, 256))],
)
def test_values(values, v_head_dim):
    _check(Layer.random("3 bits", values, v_head_dim=v_head_dim, lengths=LENGTHS, v_scale=0.25), v_scale=0.25)


@pytest.mark.parametrize("group", [1, 8, 16])
@pytest.mark.parametrize(("keys", "values"), [("3 bits", "int4"), ("float16", "int3")])
def test_integer_values_of_groups(keys, values, group):
    _check(Layer.random(keys, values, head_dim=64, group=group, num_kv_heads=1, lengths=(40,)))


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_integer_values_of_any_size(size):
    layer = Layer.random("float16", "int4", head_dim=64, num_kv_heads=1, lengths=(60,))
    layer.v *= size
    reference.write_rows(layer.q, layer.k, layer.v, layer.slots, layer.rows)
    _check(layer)


def test_float8_values_as_numbers(monkeypatch):
    monkeypatch.setattr("spark_kernels.gpu.rows._converts_float8", lambda device: True)
    _check(Layer.random("3 bits", "float8_e4m3fn", lengths=LENGTHS))


@pytest.mark.parametrize("keys", ["3 bits", "float16"])
def test_soft_cap(keys):
    _check(Layer.random(keys, "float16", lengths=LENGTHS), logits_soft_cap=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_queries(dtype):
    _check(Layer.random("3 bits", "float16", lengths=(33,)), dtype=dtype)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e4])
def test_queries_of_any_size(size):
    layer = Layer.random("3 bits", "float16", lengths=(60,))
    q = size * torch.randn(1, 8, 128)
    q[:, 1] = 0.0
    (out, lse), (expected, expected_lse) = _decode(layer, q, size=size)
    assert_close(out, expected, TOLERANCE)
    assert_lse_close(lse, expected_lse, 4 * TOLERANCE)


def test_outlier_channels():
    layer = Layer.random("3 bits", "float16", lengths=(200,))
    layer.k[:, :, ::17] *= 30
    reference.write_rows(layer.q, layer.k, layer.v, layer.slots, layer.rows)
    q = torch.randn(1, 8, 128)
    q[:, :, 5] *= 30
    (out, lse), (expected, expected_lse) = _decode(layer, q)
    assert_close(out, expected, 10 * TOLERANCE)
    assert_lse_close(lse, expected_lse, 1e-3 * expected_lse.abs().max().item())


def test_splits_are_merged(monkeypatch):
    monkeypatch.setattr("spark_kernels.gpu.plan._num_sms", lambda device: 3)
    layer = Layer.random("3 bits", "float16", head_dim=64, num_kv_heads=1, lengths=(700, 0, 5, 129))
    plan = gpu.DecodePlan.build(layer.indptr, layer.slots, 1)
    assert plan.request_splits.tolist() == [0, 6, 6, 7, 9]
    assert (plan.split_stop - plan.split_start).tolist() == [128] * 5 + [60, 5, 128, 1] + [0] * 31
    assert plan.split_request.tolist()[:9] == [0] * 6 + [2, 3, 3]
    _check(layer)


def test_strided_queries_and_int32_indices():
    layer = Layer.random("3 bits", "float16", lengths=(50, 20))
    q = torch.randn(2, 3 * 8 * 128)[:, 1024:2048].view(2, 8, 128)
    layer.slots = layer.slots.int()
    (out, _), (expected, _) = _decode(layer, q)
    assert_close(out, expected, TOLERANCE)


@pytest.mark.parametrize("lengths", [(0,), (0, 0)])
def test_requests_without_tokens_give_zeros(lengths):
    layer = Layer.random("3 bits", "float16", lengths=lengths)
    (out, lse), _ = _decode(layer, torch.randn(len(lengths), 8, 128))
    assert out.shape == (len(lengths), 8, 128) and not out.any() and (lse == -math.inf).all()


@pytest.mark.parametrize("where", ["key", "query"])
def test_a_nan_stays_in_its_request(where):
    layer = Layer.random("3 bits", "float16", lengths=(140, 30))
    q = torch.randn(2, 8, 128)
    if where == "key":
        layer.k[100, :, 9] = math.nan
        reference.write_rows(layer.q, layer.k, layer.v, layer.slots, layer.rows)
    else:
        q[0, :, 9] = math.nan
    (out, lse), _ = _decode(layer, q)
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert out[1].isfinite().all() and lse[1].isfinite().all()


def test_merge_state():
    outs, lses = torch.randn(2, 9, 4, 80), 3 * torch.randn(2, 9, 4)
    lses[0, 0] = lses[1, 1] = lses[:, 2] = -math.inf
    outs[0, 0] = math.nan
    actual = gpu.merge_state(outs[0], lses[0], outs[1], lses[1])
    expected = reference.merge_state(outs[0], lses[0], outs[1], lses[1])
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_head_dims_that_the_kernels_lack_are_refused():
    layer = Layer.random("3 bits", "float16", head_dim=80, lengths=(5,))
    with pytest.raises(NotImplementedError, match="head_dim=80"):
        _decode(layer, torch.randn(1, 8, 80))
