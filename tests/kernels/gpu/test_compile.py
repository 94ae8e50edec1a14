"""The GPU kernels compile for the GPUs they are for, keep everything in registers and stay within their budget."""

import pytest

from kernel_report import Variant, measure

ARCHS = pytest.mark.parametrize("arch", [80, 90, 100], ids=lambda arch: f"sm_{arch}")
# Warp-instructions per (token, KV head) above which the memory that is saved is paid for by computing.
BUDGET = {"bfloat16": 60, "float8": 64}


@ARCHS
@pytest.mark.parametrize("kernel", ["write", "restore_keys", "prepare_queries"])
def test_no_spills(kernel, arch):
    assert measure(Variant(kernel), arch).spill_bytes == 0


@pytest.mark.parametrize(("arch", "values"), [(80, "bfloat16"), (90, "bfloat16"), (90, "float8"), (100, "bfloat16")])
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
    ],
    ids=["raw", "group 8", "head_dim 64", "head_dim 256"],
)
def test_no_decode_variant_spills(variant):
    assert measure(variant, 90).spill_bytes == 0
