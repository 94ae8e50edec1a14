"""Fused decode attention against the reference."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_cases import KEYS, RAGGED_LENGTHS, VALUES, Layer, assert_close, assert_lse_close

from spark_kernels import SparkBatchDecodeWrapper, reference


def _decode(layer: Layer, q: torch.Tensor, indptr=None, indices=None, **arguments):
    wrapper = SparkBatchDecodeWrapper("cpu")
    wrapper.plan(
        layer.indptr if indptr is None else indptr,
        layer.slots if indices is None else indices,
        q.shape[1],
        layer.rows.num_kv_heads,
        q.shape[2],
    )
    return wrapper.run(q, layer.rows, sm_scale=layer.sm_scale, return_lse=True, **arguments)


def _queries(layer: Layer) -> torch.Tensor:
    return torch.randn(layer.batch, *layer.q.shape[1:])


def _check(layer: Layer, **arguments) -> None:
    q = _queries(layer)
    out, lse = _decode(layer, q, **arguments)
    expected = reference.decode_attention(
        q, layer.rows, layer.indptr, layer.slots, sm_scale=layer.sm_scale, **arguments
    )
    assert_close(out, expected[0], 1e-5)
    assert_lse_close(lse, expected[1], 1e-5)


@pytest.mark.parametrize("group", [3, 16], ids="group {}".format)
@pytest.mark.parametrize("head_dim", [16, 48], ids="head_dim {}".format)
@pytest.mark.parametrize("keys", KEYS)
def test_short_rows_and_groups_that_are_not_whole_quads(keys, head_dim, group):
    _check(Layer.random(keys, head_dim=head_dim, group=group))


@pytest.mark.parametrize("group", [1, 4, 8], ids="group {}".format)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("keys", KEYS)
def test_equals_reference(keys, head_dim, group):
    _check(Layer.random(keys, head_dim=head_dim, group=group))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("v_scale", [1.0, 0.25], ids="v_scale {}".format)
def test_value_formats(values, v_scale):
    _check(Layer.random(values=values, v_scale=v_scale), v_scale=v_scale)


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("values", ["int4", "int3"])
@pytest.mark.parametrize("keys", ["3 bits", "bfloat16"])
def test_integer_values(keys, values, head_dim):
    _check(Layer.random(keys, values, head_dim=head_dim))


@pytest.mark.parametrize("keys", ["3 bits", "float32"])
def test_soft_cap(keys):
    _check(Layer.random(keys), logits_soft_cap=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks(dtype):
    """Also where a request has no tokens: all goes to the sink."""
    layer = Layer.random(lengths=RAGGED_LENGTHS)
    _check(layer, sinks=torch.randn(layer.q.shape[1]).to(dtype) * 3)


@pytest.mark.parametrize("group", [2, 3, 5, 7], ids="group {}".format)
def test_groups_that_are_not_multiples_of_four(group):
    _check(Layer.random(group=group, num_kv_heads=3))


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(128, 64), (64, 128), (192, 128)])
def test_values_with_their_own_head_dim(head_dim, v_head_dim):
    _check(Layer.random(head_dim=head_dim, v_head_dim=v_head_dim))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "length"), [(17, 54), (12, 97), (17, 512), (12, 2048)], ids="{}".format)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("keys", KEYS)
def test_large_grid(keys, values, length, batch):
    _check(Layer.random(keys, values, num_kv_heads=4, group=8, lengths=(length,) * batch))


def test_float32_rows_are_as_exact_as_dense_attention():
    layer = Layer.random("float32", "float32", lengths=(2000,))
    q = _queries(layer)
    out, lse = _decode(layer, q)
    k, v = (x.double().repeat_interleave(4, 1) for x in (layer.k, layer.v))
    logits = torch.einsum("bhd,mhd->bhm", q.double(), k) * layer.sm_scale
    torch.testing.assert_close(out.double(), torch.einsum("bhm,mhd->bhd", logits.softmax(-1), v), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("keys", ["3 bits", "float32"])
@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4], ids="size {}".format)
def test_logits_of_any_size(keys, size):
    layer = Layer.random(keys)
    q = size * _queries(layer)
    out, lse = _decode(layer, q)
    expected = reference.decode_attention(q, layer.rows, layer.indptr, layer.slots, sm_scale=layer.sm_scale)
    # Rounding of a logit of size s moves its weight by about 1e-7 * s.
    assert_close(out, expected[0], max(1e-5, 1e-6 * size))
    assert_lse_close(lse, expected[1], max(1e-5, 5e-6 * size))


def test_requests_without_tokens_give_zeros():
    layer = Layer.random()
    out, lse = _decode(layer, _queries(layer))
    empty = [i for i, length in enumerate(RAGGED_LENGTHS) if length == 0]
    assert not out[empty].any() and (lse[empty] == -math.inf).all()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_nothing_to_attend_to(lengths):
    layer = Layer.random(lengths=lengths)
    out, lse = _decode(layer, _queries(layer))
    assert out.shape == (len(lengths), 8, 128) and not out.any() and (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_out_has_the_dtype_of_q(dtype):
    layer = Layer.random(lengths=(50, 20))
    q = _queries(layer).to(dtype)
    out, _ = _decode(layer, q)
    expected, _ = reference.decode_attention(q, layer.rows, layer.indptr, layer.slots, sm_scale=layer.sm_scale)
    assert out.dtype == dtype
    assert_close(out, expected, 1e-2 if dtype == torch.bfloat16 else 1e-3)


def test_out_is_filled():
    layer = Layer.random(lengths=(50, 20))
    q = _queries(layer)
    out = torch.empty(2, 2 * q.shape[1], 128)[:, ::2]
    returned, _ = _decode(layer, q, out=out)
    assert returned is out and torch.equal(out, _decode(layer, q)[0])


def test_strided_queries_int32_indices_and_spare_indices():
    layer = Layer.random(lengths=(50, 20))
    q = torch.randn(2, 3 * 8 * 128)[:, 1024:2048].view(2, 8, 128)
    spare = torch.cat([layer.slots, torch.full((9,), 10**6)]).int()
    out, _ = _decode(layer, q, indptr=layer.indptr.int(), indices=spare)
    assert torch.equal(out, _decode(layer, q.contiguous())[0])


def test_a_request_does_not_depend_on_its_batch():
    layer = Layer.random(lengths=(1000, 40, 300))
    q = _queries(layer)
    together, lse = _decode(layer, q)
    for i, (start, stop) in enumerate([(0, 1000), (1000, 1040), (1040, 1340)]):
        alone, alone_lse = _decode(
            layer, q[i : i + 1], indptr=torch.tensor([0, stop - start]), indices=layer.slots[start:stop]
        )
        assert torch.equal(alone, together[i : i + 1]) and torch.equal(alone_lse, lse[i : i + 1])


def test_a_request_does_not_depend_on_where_its_tokens_are():
    layer = Layer.random(lengths=(700,))
    q = _queries(layer)
    before = _decode(layer, q)
    moved = torch.randperm(layer.rows.num_slots)[:700]
    for rows in (layer.rows.keys, layer.rows.values):
        rows[moved] = rows[layer.slots]
    after = _decode(layer, q, indices=moved)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_a_nan_stays_in_its_request():
    layer = Layer.random(lengths=(300, 300))
    layer.k[100] = math.nan
    reference.write_rows(layer.q, layer.k, layer.v, layer.slots, layer.rows)
    out, _ = _decode(layer, _queries(layer))
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_the_thread_count_is_pytorchs_and_does_not_change_results():
    layer = Layer.random(lengths=(1500, 300))
    q = _queries(layer)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(_decode(layer, q)[0])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_calls_from_several_threads_at_once():
    layer = Layer.random(lengths=(1500, 300))
    queries = [_queries(layer) for _ in range(16)]
    expected = [_decode(layer, q)[0] for q in queries]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda q: _decode(layer, q)[0], queries))
    assert all(map(torch.equal, results, expected))
