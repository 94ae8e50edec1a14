import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spark_kernels import (
    CompressedKeyFormat,
    Int4ValueFormat,
    KeyFormat,
    LayerRows,
    RawKeyFormat,
    ValueFormat,
    legal_key_ratios,
)

head_dims = st.sampled_from(range(16, 257, 16))
restore_bits = st.sampled_from((0, 1, 2))


@st.composite
def compressed(draw) -> tuple[float, CompressedKeyFormat]:
    """A legal ratio and its format."""
    head_dim, bits = draw(head_dims), draw(restore_bits)
    ratio = draw(st.floats(*legal_key_ratios(head_dim, bits)))
    return ratio, KeyFormat.from_ratio(head_dim, ratio, bits)


@pytest.mark.parametrize(
    ("head_dim", "ratio", "bits", "kept", "row_bytes"),
    [
        (128, 0.8, 2, 26, 88),
        (128, 0.83, 2, 22, 80),
        (128, 0.77, 2, 30, 96),
        (128, 0.83, 1, 22, 64),
        (128, 0.8, 0, 26, 56),
        (64, 0.8, 2, 14, 48),
        (80, 0.8, 2, 16, 56),
        (256, 0.8, 2, 54, 176),
    ],
)
def test_sizes(head_dim, ratio, bits, kept, row_bytes):
    made = KeyFormat.from_ratio(head_dim, ratio, bits)
    assert (made.kept_channels, made.row_bytes) == (kept, row_bytes)


@pytest.mark.parametrize(("head_dim", "index_bits", "integer_max"), [(64, 6, 511), (128, 7, 255), (256, 8, 127)])
def test_kept_words(head_dim, index_bits, integer_max):
    made = KeyFormat.from_ratio(head_dim, 0.8)
    assert (made.index_bits, made.integer_max) == (index_bits, integer_max)


@given(compressed())
def test_parts_fill_the_row_in_order_without_overlap(case):
    _, made = case
    assert made.plane_offset == 0
    assert made.scale_offset == made.plane_offset + made.restore_bits * made.bit_plane_bytes
    assert made.kept_offset == made.scale_offset + 4
    assert made.kept_offset + 2 * made.kept_channels == made.row_bytes
    assert made.row_bytes % 8 == 0


@given(compressed())
def test_kept_channels_are_at_least_what_the_ratio_asks(case):
    ratio, made = case
    asked = made.head_dim - int(ratio * made.head_dim)
    assert asked <= made.kept_channels < asked + 4


@given(compressed())
def test_rows_are_smaller_than_16_bit_keys(case):
    _, made = case
    assert made.row_bytes < 2 * made.head_dim


@given(head_dims, restore_bits, st.data())
def test_a_larger_ratio_never_takes_more(head_dim, bits, data):
    ratios = st.floats(*legal_key_ratios(head_dim, bits))
    low, high = sorted((data.draw(ratios), data.draw(ratios)))
    assert KeyFormat.from_ratio(head_dim, high, bits).row_bytes <= KeyFormat.from_ratio(head_dim, low, bits).row_bytes


@given(compressed())
def test_a_word_holds_every_channel_and_integer(case):
    _, made = case
    assert made.head_dim <= 2**made.index_bits
    assert made.integer_max == 2 ** (15 - made.index_bits) - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ratio_0_is_raw(dtype):
    made = KeyFormat.from_ratio(128, 0, raw_dtype=dtype)
    assert made == RawKeyFormat(128, dtype)
    assert made.is_raw and made.row_bytes == 128 * dtype.itemsize and made.kept_channels == 128


@pytest.mark.parametrize(("head_dim", "row_bytes"), [(16, 16), (64, 40), (80, 48), (128, 72), (256, 136)])
def test_int4_sizes(head_dim, row_bytes):
    assert Int4ValueFormat(head_dim).row_bytes == row_bytes


@given(head_dims)
def test_int4_parts_fill_the_row(head_dim):
    made = Int4ValueFormat(head_dim)
    assert made.scale_offset == head_dim // 2
    assert made.scale_offset + 4 * 2 == made.row_bytes
    assert made.row_bytes % 8 == 0 and made.scale_offset % 8 == 0
    assert 4 * made.group_channels == head_dim


@pytest.mark.parametrize("ratio", [-0.1, 0.01, 0.171, 0.951, 1.0, float("nan")])
def test_illegal_ratio_is_explained(ratio):
    message = (
        rf"key_ratio={ratio} is not possible with head_dim=128 and restore_bits=2: "
        r"use 0 \(raw keys\) or a ratio from 0.172 to 0.95"
    )
    with pytest.raises(ValueError, match=message):
        KeyFormat.from_ratio(128, ratio)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeyFormat.from_ratio(72, 0.8), "head_dim=72 is not possible: use a multiple of 16 from 16 to 256"),
        (lambda: KeyFormat.from_ratio(512, 0), "head_dim=512 is not possible"),
        (lambda: KeyFormat.from_ratio(128, 0.8, 3), "restore_bits=3 is not possible: use one of 0, 1, 2"),
        (lambda: RawKeyFormat(128, torch.float64), "dtype=float64 is not possible: use one of bfloat16, float16"),
        (lambda: CompressedKeyFormat(128, 2, 90), "row_bytes=90 is not possible .* use a multiple of 8 from 38 to 248"),
        (lambda: ValueFormat(128, torch.int8), "dtype=int8 is not possible: use one of .*float8_e4m3fn"),
        (lambda: ValueFormat(100, torch.float16), "head_dim=100 is not possible"),
        (lambda: Int4ValueFormat(24), "head_dim=24 is not possible: use a multiple of 16 from 16 to 256"),
    ],
    ids=[
        "head_dim step",
        "head_dim size",
        "bits",
        "raw dtype",
        "row_bytes",
        "value dtype",
        "value head_dim",
        "int4 head_dim",
    ],
)
def test_illegal_formats_are_explained(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _tensors(**changes) -> dict:
    shapes = {"keys": (10, 2, 88), "values": (10, 2, 256), **changes}
    return {
        "keys": torch.zeros(shapes["keys"], dtype=torch.uint8),
        "values": torch.zeros(shapes["values"], dtype=torch.uint8),
        "key_format": KeyFormat.from_ratio(128, 0.8),
        "value_format": ValueFormat(128, torch.bfloat16),
    }


def test_layer_rows_know_their_shape():
    rows = LayerRows(**_tensors())
    assert (rows.num_slots, rows.num_kv_heads, rows.device.type) == (10, 2, "cpu")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_tensors(keys=(10, 2, 80)), r"keys must be uint8 \[num_slots, num_kv_heads, 88\], got uint8 \[10, 2, 80\]"),
        (_tensors(values=(10, 2, 128)), r"values must be uint8 \[num_slots, num_kv_heads, 256\]"),
        (_tensors(values=(9, 2, 256)), r"must agree in slots and KV heads, got \[10, 2\] and \[9, 2\]"),
        (_tensors() | {"keys": torch.zeros(10, 2, 88)}, "keys must be uint8 .* got float32"),
        (_tensors() | {"keys": torch.zeros(2, 10, 88, dtype=torch.uint8).transpose(0, 1)}, "keys must be contiguous"),
    ],
    ids=["key size", "value size", "slots", "dtype", "strides"],
)
def test_layer_rows_check_tensors(tensors, message):
    with pytest.raises(ValueError, match=message):
        LayerRows(**tensors)
