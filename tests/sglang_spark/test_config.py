"""Flags to settings: ranges, layer lists, and the messages a user reads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_spark.config import SparkConfig, parse_layers
from spark_kernels import Numbers


def _args(key_ratio=0.96, restore_bits=None, dense_layers="", value_dtype="int4"):
    return SimpleNamespace(
        spark_key_ratio=key_ratio,
        spark_restore_bits=restore_bits,
        spark_dense_layers=dense_layers,
        spark_value_dtype=value_dtype,
    )


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("", ()),
        ("0", (0,)),
        ("0,1,30-31", (0, 1, 30, 31)),
        (" 3 , 1 - 1,1", None),
        ("2-4,3", (2, 3, 4)),
        ("31,0", (0, 31)),
        ("0,", (0,)),
    ],
    ids=lambda value: repr(value),
)
def test_layer_lists(text, layers):
    if layers is None:
        with pytest.raises(ValueError, match="neither a layer number nor a range"):
            parse_layers(text, 32)
    else:
        assert parse_layers(text, 32) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("32", r"--spark-dense-layers='32': layer 32 does not exist, the model has layers 0 to 31"),
        ("30-40", r"layer 40 does not exist"),
        ("5-3", r"the range '5-3' runs backwards"),
        ("-1", r"'-1' is neither a layer number nor a range"),
        ("first", r"'first' is neither"),
        ("1.5", r"'1.5' is neither"),
    ],
)
def test_layer_lists_that_do_not_exist(text, message):
    with pytest.raises(ValueError, match=message):
        parse_layers(text, 32)


@pytest.mark.parametrize("key_ratio", [-0.1, 0.05, 0.991, 1.0, 80, float("nan")])
def test_ratio_out_of_range_names_flag_value_and_range(key_ratio):
    with pytest.raises(ValueError, match=rf"--spark-key-ratio={key_ratio}.*from 0\.\d+ to 0\.99"):
        SparkConfig.from_args(_args(key_ratio=key_ratio), head_dim=128, num_layers=4)


@pytest.mark.parametrize("restore_bits", [-1, 2.9, 8])
def test_bits_out_of_range_name_flag_value_and_range(restore_bits):
    with pytest.raises(ValueError, match=rf"--spark-restore-bits={restore_bits}.*use one of 0, .*3, .*4"):
        SparkConfig.from_args(_args(restore_bits=restore_bits), head_dim=128, num_layers=4)


@pytest.mark.parametrize("key_ratio", [0, 0.96])
@pytest.mark.parametrize("head_dim", [72, 512])
def test_head_dim_out_of_range_names_value_and_range(head_dim, key_ratio):
    with pytest.raises(ValueError, match=rf"head_dim={head_dim}.*multiple of 16 from 16 to 256"):
        SparkConfig.from_args(_args(key_ratio=key_ratio), head_dim=head_dim, num_layers=4)


def test_dense_layers_store_whole_keys():
    config = SparkConfig.from_args(_args(dense_layers="0,3"), head_dim=128, num_layers=4)
    formats = [config.key_format(layer, 128, torch.bfloat16) for layer in range(4)]
    assert [isinstance(key_format, Numbers) for key_format in formats] == [True, False, False, True]
    assert [key_format.row_bytes for key_format in formats] == [256, 64, 64, 256]


@pytest.mark.parametrize(("value_dtype", "row_bytes"), [("auto", 128), ("int4", 72), ("int3", 56)])
def test_values_follow_the_cache_dtype_or_are_integers(value_dtype, row_bytes):
    config = SparkConfig.from_args(_args(value_dtype=value_dtype), head_dim=128, num_layers=4)
    assert config.value_format(128, torch.float8_e4m3fn).row_bytes == row_bytes


def test_an_unknown_value_dtype_names_flag_value_and_choices():
    with pytest.raises(ValueError, match="--spark-value-dtype=int8: use one of auto, int4, int3"):
        SparkConfig.from_args(_args(value_dtype="int8"), head_dim=128, num_layers=4)


def test_ratio_zero_ignores_restore_bits():
    config = SparkConfig.from_args(_args(key_ratio=0), head_dim=128, num_layers=4)
    assert config.key_format(2, 128, torch.float16).row_bytes == 256
