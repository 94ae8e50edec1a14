"""The GPU kernels compile for the GPUs they are for, keep everything in registers and stay within their budget."""

import pytest

from kernel_report import Variant, measure, prefill_share

ARCHS = pytest.mark.parametrize("arch", [80, 90, 100], ids=lambda arch: f"sm_{arch}")
# Warp-instructions per (token, KV head) above which the memory that is saved is paid for by computing.
BUDGET = {"bfloat16": 60, "float8": 64, "int4": 60}


@ARCHS
@pytest.mark.parametrize(
    "variant",
    [
        Variant("write"),
        Variant("write", value_dtype="int4"),
        Variant("write_decode"),
        Variant("restore_keys"),
        Variant("prepare_queries"),
    ],
    ids=["write", "write int4", "write_decode", "restore_keys", "prepare_queries"],
)
def test_no_spills(variant, arch):
    assert measure(variant, arch).spill_bytes == 0


def test_write_takes_less_than_a_hundredth_of_a_prefill():
    assert prefill_share(measure(Variant("write"), 90)) < 0.01


@pytest.mark.parametrize(
    ("arch", "values"),
    [(80, "bfloat16"), (90, "bfloat16"), (100, "bfloat16"), (90, "float8"), (80, "int4"), (90, "int4"), (100, "int4")],
)
def test_decode_is_within_budget(arch, values):
    cost = measure(Variant("decode", value_dtype=values), arch)
    assert cost.spill_bytes == 0
    assert cost.warp_instr_per_token_head <= BUDGET[values]


@pytest.mark.parametrize(
    "variant",
    [
        Variant("decode", restore_bits=None),
        Variant("decode", group=8),
        Variant("decode", head_dim=64),
        Variant("decode", head_dim=256),
        Variant("decode", head_dim=64, value_dtype="int4"),
        Variant("decode", head_dim=256, value_dtype="int4"),
    ],
    ids=["raw", "group 8", "head_dim 64", "head_dim 256", "head_dim 64, int4", "head_dim 256, int4"],
)
def test_no_decode_variant_spills(variant):
    assert measure(variant, 90).spill_bytes == 0
