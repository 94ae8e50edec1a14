import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import random_calibration

from spark_kernels import Integers, KeyCalibration, LayerRows, Numbers, Pruned, legal_key_ratios
from spark_kernels.formats import WIDTHS, legal_restore_bits, profile_of

head_dims = st.sampled_from(range(16, 257, 16))


@st.composite
def pruned(draw) -> tuple[float, Pruned]:
    """A legal ratio and its format."""
    head_dim = draw(head_dims)
    bits = draw(st.sampled_from(legal_restore_bits(head_dim)))
    ratio = draw(st.floats(*legal_key_ratios(head_dim, bits)))
    return ratio, Pruned.from_ratio(head_dim, ratio, bits)


@pytest.mark.parametrize(
    ("head_dim", "ratio", "bits", "profile", "kept", "row_bytes"),
    [
        (128, 0.96, 3, (64, 64, 0, 0), 6, 64),
        (128, 0.96, 4, (128, 0, 0, 0), 6, 80),
        (128, 0.96, 2.5, (48, 56, 16, 8), 6, 56),
        (128, 0.96, 2, (32, 48, 32, 16), 6, 48),
        (128, 0.8, 0, (0, 0, 0, 128), 26, 56),
        (64, 0.96, 3, (32, 32, 0, 0), 6, 40),
        (64, 0.96, 4, (64, 0, 0, 0), 6, 48),
        (80, 0.96, 3, (40, 40, 0, 0), 7, 48),
        (256, 0.96, 3, (128, 128, 0, 0), 14, 128),
        (64, 0.96, 2, (16, 24, 16, 8), 6, 32),
        (128, 0.96, 3.25, (80, 48, 0, 0), 8, 72),
    ],
)
def test_sizes(head_dim, ratio, bits, profile, kept, row_bytes):
    made = Pruned.from_ratio(head_dim, ratio, bits)
    assert (made.profile, made.kept_channels, made.row_bytes) == (profile, kept, row_bytes)


@pytest.mark.parametrize(("head_dim", "position_bits", "integer_max"), [(64, 6, 511), (128, 7, 255), (256, 8, 127)])
def test_kept_words(head_dim, position_bits, integer_max):
    made = Pruned.from_ratio(head_dim, 0.8, 3)
    assert (made.position_bits, made.integer_max) == (position_bits, integer_max)


@given(pruned())
def test_parts_fill_the_row_in_order_without_overlap(case):
    _, made = case
    end = position = 0
    for plane in made.planes:
        assert (plane.offset, plane.start) == (end, position)
        assert 8 * (plane.end - plane.offset) == plane.bits * plane.channels
        end, position = plane.end, position + plane.channels
    assert position == made.restored_channels == made.head_dim - made.profile[-1]
    assert made.scale_offset == end and made.kept_offset == end + 4
    assert 0 <= made.row_bytes - (made.kept_offset + 2 * made.kept_channels) < 8
    assert made.row_bytes % 8 == 0


@given(pruned())
def test_kept_channels_are_at_least_what_the_ratio_asks(case):
    ratio, made = case
    asked = made.head_dim - int(ratio * made.head_dim)
    least_row = made.row_bytes == 16
    assert min(asked, made.head_dim) <= made.kept_channels and (least_row or made.kept_channels < asked + 4)


@given(pruned())
def test_rows_are_smaller_than_16_bit_keys(case):
    _, made = case
    assert made.row_bytes < 2 * made.head_dim


@given(head_dims, st.data())
def test_a_profile_has_the_width_it_was_asked_for(head_dim, data):
    bits = data.draw(st.sampled_from(legal_restore_bits(head_dim)))
    profile = profile_of(head_dim, bits)
    assert sum(profile) == head_dim
    assert math.isclose(sum(map(math.prod, zip(WIDTHS, profile, strict=True))) / head_dim, bits)


@pytest.mark.parametrize(("head_dim", "row_bytes"), [(16, 16), (64, 40), (80, 48), (128, 72), (256, 136)])
def test_int4_sizes(head_dim, row_bytes):
    assert Integers(head_dim).row_bytes == row_bytes


@pytest.mark.parametrize(("head_dim", "row_bytes"), [(16, 16), (64, 32), (80, 32), (128, 56), (256, 104)])
def test_int3_sizes(head_dim, row_bytes):
    assert Integers(head_dim, 3).row_bytes == row_bytes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Pruned.from_ratio(128, 1.0, 3),
            r"key_ratio=1.0 is not possible with head_dim=128 and restore_bits=3: "
            r"use 0 \(whole keys\) or a ratio from 0.235 to 0.99",
        ),
        (lambda: Pruned.from_ratio(128, -0.1, 3), "key_ratio=-0.1 is not possible"),
        (lambda: Pruned.from_ratio(128, math.nan, 3), "key_ratio=nan is not possible"),
        (lambda: Pruned.from_ratio(72, 0.8, 3), "head_dim=72 is not possible: use a multiple of 16 from 16 to 256"),
        (
            lambda: Pruned.from_ratio(16, 0.8, 2.2),
            "restore_bits=2.2 is not possible with head_dim=16: use one of 0, 3, 4",
        ),
        (lambda: Pruned.from_ratio(128, 0.8, 5), "restore_bits=5 is not possible with head_dim=128: use one of 0, "),
        (lambda: Pruned.from_ratio(128, 0.8, math.nan), "restore_bits=nan is not possible"),
        (lambda: Pruned(128, (64, 60, 4, 0), 6), r"profile=\(64, 60, 4, 0\) is not possible: use multiples of 8"),
        (
            lambda: Pruned(128, (64, 56, 8, 0), 6),
            r"profile=\(64, 56, 8, 0\) is not possible: .* of 16 for channels",
        ),
        (
            lambda: Pruned(128, (64, 32, 0, 0), 6),
            r"with head_dim=128: use the numbers of channels with 4, 2, 1, 0 bits",
        ),
        (lambda: Pruned(128, (64, 64, 0, 0), 0), "kept_channels=0 is not possible .* use 1 to 98"),
        (lambda: Pruned(128, (64, 64, 0, 0), 99), "kept_channels=99 is not possible .* use 1 to 98"),
        (lambda: Numbers(128, torch.float64), "dtype=float64 is not possible: use one of bfloat16, float16"),
        (lambda: Numbers(100, torch.float16), "head_dim=100 is not possible"),
        (lambda: Integers(24), "head_dim=24 is not possible: use a multiple of 16 from 16 to 256"),
        (lambda: Integers(64, 5), "bits=5 is not possible: use one of 4, 3"),
    ],
)
def test_illegal_formats_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _calibration(**changes) -> KeyCalibration:
    made = random_calibration(2, 16)
    return KeyCalibration(**{"centre": made.centre, "step": made.step, "order": made.order} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": torch.ones(2, 32)}, r"step must be float32 \[num_kv_heads, head_dim\] \[2, 16\]"),
        ({"order": torch.arange(16).expand(2, 16)}, r"order must be int32 .* got int64"),
        ({"centre": torch.full((2, 16), math.nan)}, "centre must be finite"),
        ({"step": torch.zeros(2, 16)}, "step must be finite and positive"),
        ({"order": torch.zeros(2, 16, dtype=torch.int32)}, "order must be a permutation"),
    ],
)
def test_a_bad_calibration_is_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        _calibration(**changes)


def test_channels_stand_in_order_of_what_an_error_costs():
    deviation = torch.tensor([[4.0, 1.0, 2.0, 3.0] * 4])
    query_rms = torch.tensor([[1.0, 9.0, 1.0, 1.0] * 4])
    made = KeyCalibration.from_statistics(torch.zeros(1, 16), deviation, query_rms)
    assert made.order.tolist() == [[1, 5, 9, 13, 0, 4, 8, 12, 3, 7, 11, 15, 2, 6, 10, 14]]
    by_position = made.restoration(Pruned(16, (8, 8, 0, 0), 3))
    assert by_position.order.gather(1, by_position.position.long()).tolist() == [list(range(16))]
    steps = torch.tensor([[1.0] * 4 + [4.0] * 4 + [3.0] * 4 + [2.0] * 4])
    assert torch.equal(by_position.inverse_step, 1 / steps)
    torch.testing.assert_close(by_position.unit, 0.75 * steps * torch.tensor([0.3352] * 8 + [0.9957] * 8))


def test_a_channel_that_never_moves_has_a_step():
    made = KeyCalibration.from_statistics(torch.zeros(2, 16), torch.eye(2, 16), torch.ones(2, 16))
    assert (made.step > 0).all()
    assert KeyCalibration.from_statistics(*[torch.zeros(2, 16)] * 3).step.min() > 0


def _tensors(**changes) -> dict:
    shapes = {"keys": (10, 2, 64), "values": (10, 2, 256), **changes}
    return {
        "keys": torch.zeros(shapes["keys"], dtype=torch.uint8),
        "values": torch.zeros(shapes["values"], dtype=torch.uint8),
        "key_format": Pruned.from_ratio(128, 0.96, 3),
        "value_format": Numbers(128, torch.bfloat16),
        "calibration": random_calibration(2, 128),
    }


def test_layer_rows_know_their_shape():
    rows = LayerRows(**_tensors())
    assert (rows.num_slots, rows.num_kv_heads, rows.device.type) == (10, 2, "cpu")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_tensors(keys=(10, 2, 80)), r"keys must be uint8 \[num_slots, num_kv_heads, 64\], got uint8 \[10, 2, 80\]"),
        (_tensors(values=(10, 2, 128)), r"values must be uint8 \[num_slots, num_kv_heads, 256\]"),
        (_tensors(values=(9, 2, 256)), r"must agree in slots and KV heads, got \[10, 2\] and \[9, 2\]"),
        (_tensors() | {"keys": torch.zeros(10, 2, 64)}, "keys must be uint8 .* got float32"),
        (_tensors() | {"keys": torch.zeros(2, 10, 64, dtype=torch.uint8).transpose(0, 1)}, "keys must be contiguous"),
        (_tensors() | {"calibration": None}, "calibration belongs to pruned keys, and they need one"),
        (_tensors() | {"calibration": random_calibration(2, 64)}, r"calibration must be for .* \[2, 128\] on cpu"),
    ],
    ids=["key size", "value size", "slots", "dtype", "strides", "no calibration", "other calibration"],
)
def test_layer_rows_check_tensors(tensors, message):
    with pytest.raises(ValueError, match=message):
        LayerRows(**tensors)


@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_the_ends_of_legal_ratios_are_possible(head_dim):
    for bits in legal_restore_bits(head_dim):
        for ratio in legal_key_ratios(head_dim, bits):
            assert Pruned.from_ratio(head_dim, ratio, bits).kept_channels >= 1
