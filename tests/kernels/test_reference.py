"""The reference against arithmetic by hand and against PyTorch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KEYS, Layer, assert_close, assert_lse_close, key_format

from spark_kernels import Int4ValueFormat, LayerRows, RawKeyFormat, ValueFormat, reference

FLOAT32_MAX = torch.finfo(torch.float32).max
COMPRESSED = tuple(keys for keys in KEYS if not keys.startswith("raw"))


def _packed(k: torch.Tensor, made) -> torch.Tensor:
    channels = reference.select_channels(k.float().abs(), made.kept_channels)
    return reference.pack_keys(k, channels, made)


def test_saliency_is_squared_key_times_norm_over_window_and_group():
    q = torch.tensor([[[9.0] * 16, [9.0] * 16], [[3.0] * 16, [0.0] * 16], [[0.0] * 16, [4.0] * 16]])
    k = torch.full((3, 1, 16), 2.0)
    norms = reference.query_norms(q, 1, qo_indptr=torch.tensor([0, 3]), window=2)
    assert torch.equal(reference.saliency(k, norms), torch.full((3, 1, 16), 4.0 * 5.0))


def test_in_decode_each_token_has_its_own_query():
    q = torch.randn(5, 8, 32)
    expected = q.view(5, 2, 4, 32).square().sum(2).sqrt()
    torch.testing.assert_close(reference.query_norms(q, 2), expected)


def test_the_window_is_the_end_of_each_request():
    q = torch.randn(50, 2, 16)
    norms = reference.query_norms(q, 2, qo_indptr=torch.tensor([0, 10, 10, 50]), window=32)
    torch.testing.assert_close(norms[:10], q[:10].square().sum(0).sqrt().expand(10, 2, 16))
    torch.testing.assert_close(norms[10:], q[18:].square().sum(0).sqrt().expand(40, 2, 16))


def test_equal_scores_go_to_the_lower_channel():
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert reference.select_channels(scores, 4).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("k", [math.inf, math.nan, 3e38])
def test_scores_are_finite(k):
    assert reference.saliency(torch.full((1, 1, 16), k), torch.zeros(1, 1, 16)).isfinite().all()


@pytest.mark.parametrize("keys", COMPRESSED)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3], ids="size {}".format)
def test_restore_error_is_bounded_by_the_scales(keys, head_dim, size):
    made = key_format(keys, head_dim)
    k = size * torch.randn(100, head_dim)
    rows = _packed(k, made)
    error = (reference.unpack_keys(rows, made) - k).abs()
    channels = reference.select_channels(k.abs(), made.kept_channels)
    scales = rows[:, made.scale_offset : made.kept_offset].contiguous().view(torch.float16).double()
    rounding = 1e-6 * k.abs().amax(-1, keepdim=True)
    assert (error.gather(1, channels) <= 0.5 * scales[:, 1:] + rounding).all()
    largest_dropped = k.abs().scatter(1, channels, 0.0).amax(-1, keepdim=True)
    dropped = error.scatter(1, channels, 0.0)
    # 2 bits: levels are half a scale apart and the scale is rounded by at most 2**-11 of itself or half of 2**-24.
    bound = {0: largest_dropped, 1: largest_dropped, 2: 0.2505 * largest_dropped + 2.0**-24}[made.restore_bits]
    assert (dropped <= bound + rounding).all()


def test_more_restore_bits_restore_better():
    k = torch.randn(500, 128)
    errors = []
    for keys in ("0-bit", "1-bit", "2-bit"):
        made = key_format(keys, 128)
        errors.append((reference.unpack_keys(_packed(k, made), made) - k).square().mean().sqrt())
    assert errors[0] > 1.4 * errors[1] and errors[1] > 1.4 * errors[2]


def test_outliers_are_kept_to_half_a_step():
    made = key_format("2-bit", 128)
    k = torch.randn(200, 128)
    k[:, :5] *= 70
    restored = reference.unpack_keys(_packed(k, made), made)
    assert_close(restored[:, :5], k[:, :5], 0.01)


@given(st.lists(st.floats(-FLOAT32_MAX, FLOAT32_MAX, width=32), min_size=16, max_size=16), st.sampled_from(COMPRESSED))
@settings(max_examples=200, deadline=None)
def test_finite_keys_restore_to_finite_keys(numbers, keys):
    made = key_format(keys, 16)
    assert reference.unpack_keys(_packed(torch.tensor([numbers]), made), made).isfinite().all()


@given(
    st.lists(st.floats(-60000, 60000, width=32, allow_subnormal=False), min_size=16, max_size=16),
    st.sampled_from(COMPRESSED),
)
@settings(max_examples=200, deadline=None)
def test_integers_never_clip(numbers, keys):
    made = key_format(keys, 16)
    k = torch.tensor([numbers])
    channels = reference.select_channels(k.abs(), made.kept_channels)
    rows = reference.pack_keys(k, channels, made)
    error = (reference.unpack_keys(rows, made) - k).gather(1, channels).abs().amax()
    kept_scale = rows[0, made.scale_offset + 2 : made.kept_offset].view(torch.float16).item()
    assert error <= 0.5 * kept_scale + 1e-6 * k.abs().amax()


@pytest.mark.parametrize("keys", COMPRESSED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_key_that_is_not_finite_shows_in_its_own_score_only(keys, bad):
    made = key_format(keys, 64)
    k = torch.randn(2, 64)
    k[0, 40] = bad
    scores = reference.unpack_keys(_packed(k, made), made) @ torch.randn(64)
    assert scores[0].isnan() and scores[1].isfinite()


@pytest.mark.parametrize(("dtype", "limit"), [("float8_e4m3fn", 448.0), ("float16", 65504.0)])
def test_values_saturate(dtype, limit):
    made = ValueFormat(16, getattr(torch, dtype))
    rows = reference.encode_values(torch.tensor([[1e30, -1e30, 1.0, 0.0] * 4]), made)
    assert reference.decode_values(rows, made)[0, :4].tolist() == [limit, -limit, 1.0, 0.0]


@pytest.mark.parametrize("made", [ValueFormat(16, torch.float8_e4m3fn), Int4ValueFormat(16)], ids=["float8", "int4"])
def test_v_scale_is_divided_out_and_back(made):
    v = 2000 * torch.rand(50, 16)
    assert_close(reference.decode_values(reference.encode_values(v, made, 8.0), made, 8.0), v, 0.06)


def test_an_int4_row_by_hand():
    made = Int4ValueFormat(16)
    v = torch.tensor([[4.0, -8.0, 0.5, 1.5, 16.0, 2.0, -16.0, 1.0, 24.0, -3.0, 0.0, -4.5, 0.0, -0.0, 0.0, 0.0]])
    row = reference.encode_values(v, made)
    # Steps of 1, 2, -3 and 0; ties go to the even integer.
    integers = [[4, -8, 0, 2], [7, 1, -8, 0], [-8, 1, 0, 2], [0, 0, 0, 0]]
    words = [sum((integers[i][j] + 8) << 4 * i for i in range(4)) for j in range(4)]
    assert (row[0, :8].view(torch.int16).int() & 0xFFFF).tolist() == words
    assert row[0, 8:].view(torch.float16).tolist() == [1.0, 2.0, -3.0, 0.0]
    restored = reference.decode_values(row, made)
    expected = [[4.0, -8.0, 0.0, 2.0, 14.0, 2.0, -16.0, 0.0, 24.0, -3.0, 0.0, -6.0, 0.0, 0.0, 0.0, 0.0]]
    assert restored.tolist() == expected


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3], ids="size {}".format)
def test_int4_values_are_within_a_step(head_dim, size):
    made = Int4ValueFormat(head_dim)
    v = size * torch.randn(200, head_dim)
    error = (reference.decode_values(reference.encode_values(v, made), made) - v).abs().unflatten(-1, (4, -1))
    largest = v.abs().unflatten(-1, (4, -1)).amax(-1, keepdim=True)
    # As large as the largest and of the other sign, a number is cut by a whole step, an eighth (and rounding) of it.
    assert (error <= 0.1255 * largest).all()
    assert (error.square().mean().sqrt() < 0.1 * size) and (error.amin(-1, keepdim=True) <= 1e-3 * largest).all()


def test_int4_values_saturate_and_keep_nan_to_their_group():
    made = Int4ValueFormat(64)
    v = torch.ones(4, 64)
    v[0, 3], v[1, 20], v[2, 40], v[3, 5] = 1e30, -math.inf, math.inf, math.nan
    restored = reference.decode_values(reference.encode_values(v, made), made)
    assert (restored[0, 3], restored[1, 20], restored[2, 40]) == (65504.0, -65504.0, 65504.0)
    assert restored[3, :16].isnan().all() and (restored[3, 16:] == 1.0).all()


@given(st.lists(st.floats(-FLOAT32_MAX, FLOAT32_MAX, width=32), min_size=16, max_size=16))
@settings(max_examples=200, deadline=None)
def test_finite_values_restore_to_finite_int4_values(numbers):
    made = Int4ValueFormat(16)
    assert reference.decode_values(reference.encode_values(torch.tensor([numbers]), made), made).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_raw_rows_are_the_keys_and_values(dtype):
    rows = LayerRows.allocate(20, 2, RawKeyFormat(64, dtype), ValueFormat(64, dtype))
    q, k, v = (torch.randn(9, heads, 64).to(dtype) for heads in (4, 2, 2))
    slots = torch.randperm(20)[:9]
    reference.write_rows(q, k, v, slots, rows)
    assert torch.equal(reference.restore_keys(rows, slots), k.float())
    assert torch.equal(reference.restore_values(rows, slots), v.float())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_attention_equals_pytorch(causal):
    layer = Layer.random("raw float32", "float32", lengths=(40,))
    new = slice(30, 40)
    out, lse = reference.extend_attention(
        *(x[new] for x in (layer.q, layer.k, layer.v)),
        layer.rows,
        torch.tensor([0, 10]),
        torch.tensor([0, 30]),
        layer.slots[:30],
        causal=causal,
        sm_scale=0.1,
    )
    mask = torch.ones(10, 40, dtype=torch.bool).tril(30) if causal else None
    q, k, v = (x.transpose(0, 1) for x in (layer.q[new], layer.k, layer.v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.1, enable_gqa=True)
    assert_close(out, expected.transpose(0, 1), 1e-5)
    logits = 0.1 * q @ k.repeat_interleave(4, 0).mT
    if causal:
        logits = logits.masked_fill(~mask, -math.inf)
    assert_lse_close(lse, logits.logsumexp(-1).T, 1e-5)


def test_the_soft_cap_bends_logits():
    layer = Layer.random("raw float32", "float32", lengths=(40,))
    _, lse = reference.dense_attention(layer.q, layer.k, layer.v, sm_scale=1.0, logits_soft_cap=2.0)
    logits = torch.einsum("nhd,mhd->nhm", layer.q, layer.k.repeat_interleave(4, 1))
    assert_lse_close(lse, (2 * (logits / 2).tanh()).logsumexp(-1), 1e-5)


def test_merged_parts_equal_the_whole():
    layer = Layer.random(lengths=(90,))
    k, v = (x.float() for x in (layer.k, layer.v))
    whole = reference.dense_attention(layer.q, k, v, sm_scale=0.1)
    parts = [reference.dense_attention(layer.q, k[part], v[part], sm_scale=0.1) for part in (slice(70), slice(70, 90))]
    merged = reference.merge_state(*parts[0], *parts[1])
    assert_close(merged[0], whole[0], 1e-5)
    assert_lse_close(merged[1], whole[1], 1e-5)


def test_merging_with_nothing_changes_nothing():
    out, lse = torch.randn(3, 4, 16), torch.randn(3, 4)
    nothing = torch.full((3, 4, 16), math.nan), torch.full((3, 4), -math.inf)
    for merged in (reference.merge_state(out, lse, *nothing), reference.merge_state(*nothing, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    assert torch.equal(reference.merge_state(*nothing, *nothing)[0], torch.zeros(3, 4, 16))
