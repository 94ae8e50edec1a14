"""The reference against arithmetic by hand and against PyTorch."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import PRUNED, Layer, assert_close, assert_lse_close, key_format, random_calibration

from spark_kernels import Integers, KeyCalibration, LayerRows, Numbers, Pruned, reference

FLOAT32_MAX = torch.finfo(torch.float32).max


def _rows(made: Pruned, num_slots: int, calibration: KeyCalibration | None = None) -> LayerRows:
    calibration = calibration or random_calibration(1, made.head_dim)
    return LayerRows.allocate(num_slots, 1, made, Numbers(16, torch.bfloat16), calibration)


def _pack(k: torch.Tensor, rows: LayerRows, squares: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of keys ``[n, head_dim]`` of one KV head."""
    squares = torch.ones_like(k) if squares is None else squares
    return reference.pack_keys(k[:, None], squares[:, None], rows.restoration, rows.key_format)


def _restored(k: torch.Tensor, rows: LayerRows, squares: torch.Tensor | None = None) -> torch.Tensor:
    return reference.unpack_keys(_pack(k, rows, squares), rows.restoration, rows.key_format)[:, 0]


def _kept(packed: torch.Tensor, rows: LayerRows) -> list[list[int]]:
    """Channels that a row keeps, ascending."""
    made = rows.key_format
    end = made.kept_offset + 2 * made.kept_channels
    words = packed[:, 0, made.kept_offset : end].contiguous().view(torch.int16).int() & 0xFFFF
    positions = words >> made.magnitude_bits & (1 << made.position_bits) - 1
    return rows.restoration.order[0][positions.long()].sort(-1).values.tolist()


def test_query_squares_run_over_window_and_group():
    q = torch.tensor([[[9.0] * 16, [9.0] * 16], [[3.0] * 16, [0.0] * 16], [[0.0] * 16, [4.0] * 16]])
    squares = reference.query_squares(q, 1, qo_indptr=torch.tensor([0, 3]), window=2)
    assert torch.equal(squares, torch.full((3, 1, 16), 25.0))


def test_in_decode_each_token_has_its_own_query():
    q = torch.randn(5, 8, 32)
    expected = q.view(5, 2, 4, 32).square().sum(2)
    torch.testing.assert_close(reference.query_squares(q, 2), expected)


def test_the_window_is_the_end_of_each_request():
    q = torch.randn(50, 2, 16)
    squares = reference.query_squares(q, 2, qo_indptr=torch.tensor([0, 10, 10, 50]), window=32)
    torch.testing.assert_close(squares[:10], q[:10].square().sum(0).expand(10, 2, 16))
    torch.testing.assert_close(squares[10:], q[18:].square().sum(0).expand(40, 2, 16))


def test_equal_scores_go_to_the_lower_position():
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert reference.select_channels(scores, 4).tolist() == [1, 2, 3, 4]


def test_a_row_by_hand():
    made = Pruned(16, (8, 8, 0, 0), 2)
    order = torch.tensor([[15, *range(15)]], dtype=torch.int32)
    calibration = KeyCalibration(torch.full((1, 16), 10.0), torch.ones(1, 16), order)
    rows = _rows(made, 1, calibration)
    # Channel 15 has position 0. Squares: two of 9, one of them cut, and 14 of 1/4; tau is the root of 21.5 / 16.
    x = torch.tensor([[-3.0, 5.0, *[0.5] * 14]])
    packed = _pack(10.0 + x.roll(-1), rows)[0, 0]
    tau = packed[made.scale_offset : made.scale_offset + 2].view(torch.float16).item()
    assert tau == torch.tensor(21.5 / 16).sqrt().half().item()
    # Units are 0.2514 and 0.7468 times tau: -3 is below the first of 16 levels, 5 above the last, 0.5 in level 1 and,
    # of 2 bits, in level 0.
    codes = [-8 + 8, 7 + 8, *[1 + 8] * 6]
    assert packed[:4].tolist() == [codes[j] | codes[j + 1] << 4 for j in range(0, 8, 2)]
    assert packed[4:6].tolist() == [2 | 2 << 2 | 2 << 4 | 2 << 6] * 2
    # The largest errors that restoration leaves: -3 against -7.5 units, and 5 against 7.5. The former is negative.
    words = packed[made.kept_offset : made.kept_offset + 4].view(torch.int16).int() & 0xFFFF
    assert (words >> made.magnitude_bits).tolist() == [0 | 1 << made.position_bits, 1]
    assert words[1] & made.integer_max in (made.integer_max - 1, made.integer_max)
    assert _restored(10.0 + x.roll(-1), rows)[0, 0].item() == pytest.approx(15.0, abs=1e-3)


def test_kept_channels_are_those_that_matter_to_queries_and_restore_badly():
    made = key_format("3 bits", 64)
    rows = _rows(made, 100)
    centre, step = rows.calibration.centre, rows.calibration.step
    k = centre + step * torch.randn(100, 64).clamp(-1.5, 1.5)
    k[:, 3] = centre[0, 3] + 20 * step[0, 3]
    k[:, 5] = centre[0, 5] - 20 * step[0, 5]
    squares = torch.ones(100, 64)
    squares[:, 5] = 0.0
    kept = _kept(_pack(k, rows, squares), rows)
    assert all(3 in channels and 5 not in channels for channels in kept)
    restored = _restored(k, rows, squares)
    assert_close(restored[:, 3], k[:, 3], 0.01)
    assert ((restored[:, 5] - k[:, 5]).abs() > 5 * step[0, 5]).all()


@pytest.mark.parametrize("keys", PRUNED)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3], ids="size {}".format)
def test_kept_channels_are_exact_to_half_a_step(keys, head_dim, size):
    rows = _rows(key_format(keys, head_dim), 1)
    k = size * torch.randn(100, head_dim)
    packed = _pack(k, rows)
    error = (reference.unpack_keys(packed, rows.restoration, rows.key_format)[:, 0] - k).abs()
    kappa_offset = rows.key_format.scale_offset + 2
    kappa = packed[:, 0, kappa_offset : kappa_offset + 2].contiguous().view(torch.float16).float()
    rounding = 1e-5 * (k.abs().amax(-1, keepdim=True) + rows.calibration.centre.abs().max())
    assert (error.gather(1, torch.tensor(_kept(packed, rows))) <= 0.5 * kappa + rounding).all()


def test_more_bits_restore_better():
    errors = []
    for keys in ("0 bits", "2 bits", "3 bits", "4 bits"):
        layer = Layer.random(keys, lengths=(500,))
        step = layer.rows.calibration.step
        errors.append(((reference.restore_keys(layer.rows, layer.slots) - layer.k) / step).square().mean().sqrt())
    assert all(more > 1.3 * less for more, less in itertools.pairwise(errors))


def test_the_centre_costs_nothing():
    """Keys that all move by a constant vector, with their centre, have the same codes."""
    made = key_format("3 bits", 64)
    calibration = random_calibration(1, 64)
    base = KeyCalibration(torch.zeros(1, 64), calibration.step, calibration.order)
    moved = KeyCalibration(torch.full((1, 64), 64.0), calibration.step, calibration.order)
    # Keys that moving does not round.
    k = (torch.randn(50, 64) * 2**8).round() / 2**8
    assert torch.equal(_pack(k, _rows(made, 1, base)), _pack(k + 64.0, _rows(made, 1, moved)))


@given(st.lists(st.floats(-FLOAT32_MAX, FLOAT32_MAX, width=32), min_size=16, max_size=16), st.sampled_from(PRUNED))
@settings(max_examples=200, deadline=None)
def test_finite_keys_restore_to_finite_keys(numbers, keys):
    rows = _rows(key_format(keys, 16), 1)
    assert _restored(torch.tensor([numbers]), rows).isfinite().all()
    infinite = torch.full((1, 16), math.inf)
    assert _restored(torch.tensor([numbers]), rows, infinite).isfinite().all()


@pytest.mark.parametrize("keys", PRUNED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_key_that_is_not_finite_shows_in_its_own_score_only(keys, bad):
    rows = _rows(key_format(keys, 64), 1)
    k = torch.randn(2, 64)
    k[0, 40] = bad
    scores = _restored(k, rows) @ torch.randn(64)
    assert scores[0].isnan() and scores[1].isfinite()


@pytest.mark.parametrize(("dtype", "limit"), [("float8_e4m3fn", 448.0), ("float16", 65504.0)])
def test_values_saturate(dtype, limit):
    made = Numbers(16, getattr(torch, dtype))
    rows = reference.encode_values(torch.tensor([[1e30, -1e30, 1.0, 0.0] * 4]), made)
    assert reference.decode_values(rows, made)[0, :4].tolist() == [limit, -limit, 1.0, 0.0]


@pytest.mark.parametrize("made", [Numbers(16, torch.float8_e4m3fn), Integers(16)], ids=["float8", "int4"])
def test_v_scale_is_divided_out_and_back(made):
    v = 1000 * torch.randn(50, 16).clamp(-3, 3)
    assert_close(reference.decode_values(reference.encode_values(v, made, 8.0), made, 8.0), v, 0.12)


def test_a_transform_is_its_own_inverse():
    x = torch.randn(10, 48)
    assert_close(reference.hadamard(reference.hadamard(x, 16), 16), 16 * x, 1e-6)
    assert torch.equal(reference.hadamard(torch.eye(2), 2), torch.tensor([[1.0, 1.0], [1.0, -1.0]]))


def test_an_int4_row_by_hand():
    made = Integers(16)
    # The transform of a constant is one number, 16 / 4 times it, and it has the last code.
    row = reference.encode_values(torch.full((1, 16), 2.0), made)
    assert row[0, :8].tolist() == [15 | 8 << 4, *[8 | 8 << 4] * 7]
    scale = row[0, 8:10].view(torch.float16).item()
    # Least squares: 8 over 7.5, with 15 halves beside it.
    assert scale == torch.tensor(8 * 7.5 / (7.5**2 + 15 * 0.25)).half().item()
    assert row[0, 10:].tolist() == [0] * 6


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256], ids="head_dim {}".format)
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3], ids="size {}".format)
def test_integers_have_the_error_of_their_bits(bits, head_dim, size):
    """A uniform quantiser's for a normal distribution (Max 1960): 0.0115 and 0.0374 of the variance, 10 % allowed."""
    made = Integers(head_dim, bits)
    v = size * torch.randn(2000, head_dim)
    error = (reference.decode_values(reference.encode_values(v, made), made) - v).square().mean() / size**2
    assert error < {4: 0.0127, 3: 0.0412}[bits]


def test_integers_saturate_and_keep_nan_to_their_value():
    made = Integers(64)
    v = torch.ones(3, 64)
    v[0] *= 1e30 * torch.randn(64)
    v[1, 3], v[2, 5] = -math.inf, math.nan
    restored = reference.decode_values(reference.encode_values(v, made), made)
    assert_close(restored[0], 65504.0 * v[0].sign(), 0.6)
    assert restored[1].isfinite().all() and restored[1, 3] < -30000
    assert restored[2].isnan().all()


@pytest.mark.parametrize("bits", [3, 4])
@given(numbers=st.lists(st.floats(-FLOAT32_MAX, FLOAT32_MAX, width=32), min_size=16, max_size=16))
@settings(max_examples=200, deadline=None)
def test_finite_values_restore_to_finite_values(bits, numbers):
    made = Integers(16, bits)
    assert reference.decode_values(reference.encode_values(torch.tensor([numbers]), made), made).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_of_numbers_are_the_keys_and_values(dtype):
    rows = LayerRows.allocate(20, 2, Numbers(64, dtype), Numbers(64, dtype))
    q, k, v = (torch.randn(9, heads, 64).to(dtype) for heads in (4, 2, 2))
    slots = torch.randperm(20)[:9]
    reference.write_rows(q, k, v, slots, rows)
    assert torch.equal(reference.restore_keys(rows, slots), k.float())
    assert torch.equal(reference.restore_values(rows, slots), v.float())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_attention_equals_pytorch(causal):
    layer = Layer.random("float32", "float32", lengths=(40,))
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
    layer = Layer.random("float32", "float32", lengths=(40,))
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
