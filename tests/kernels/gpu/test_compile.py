"""The GPU kernels compile for the GPUs they are for, keep everything in registers and stay within their budget."""

import pytest

from kernel_report import Variant, measure, prefill_share

ARCHS = pytest.mark.parametrize("arch", [80, 90, 100], ids=lambda arch: f"sm_{arch}")
# A tenth above what the kernels take: warp-instructions per (token, KV head) by values on H100, and the share of a
# prefill chunk's matrix products.
DECODE_BUDGET = {"bfloat16": 62, "float8": 71, "int4": 82, "int3": 89}
WRITE_BUDGET = {"bfloat16": 0.0151, "int4": 0.0212}


@ARCHS
@pytest.mark.parametrize(
    "variant",
    [
        Variant("write"),
        Variant("write", value_dtype="bfloat16"),
        Variant("write_decode"),
        Variant("restore_keys"),
        Variant("prepare_queries"),
    ],
    ids=["write", "write bfloat16", "write_decode", "restore_keys", "prepare_queries"],
)
def test_no_spills(variant, arch):
    assert measure(variant, arch).spill_bytes == 0


@pytest.mark.parametrize("values", WRITE_BUDGET)
def test_write_is_within_budget(values):
    assert prefill_share(measure(Variant("write", value_dtype=values), 90)) < WRITE_BUDGET[values]


@pytest.mark.parametrize("values", DECODE_BUDGET)
def test_decode_is_within_budget(values):
    assert measure(Variant("decode", value_dtype=values), 90).warp_instr_per_token_head <= DECODE_BUDGET[values]


@ARCHS
@pytest.mark.parametrize(
    "variant",
    [
        Variant("decode"),
        Variant("decode", value_dtype="bfloat16"),
        Variant("decode", value_dtype="float8"),
        Variant("decode", restore_bits=None, value_dtype="bfloat16"),
        Variant("decode", group=16),
        Variant("decode", head_dim=64, restore_bits=4),
        Variant("decode", head_dim=256),
    ],
    ids=["int4", "bfloat16", "float8", "keys too", "group 16", "head_dim 64", "head_dim 256"],
)
def test_no_decode_variant_spills(variant, arch):
    assert measure(variant, arch).spill_bytes == 0
