"""Arithmetic of scripts/kernel_report.py; what it counts is tested in tests/kernels/gpu/test_compile.py."""

import pytest

from kernel_report import Cost, prefill_share


def test_share_of_a_prefill():
    write = Cost("write", 128, 4, 2, "bfloat16", 90, 46, 0, 256, 1400, 344)
    # 8 heads of 1,400 instructions at 2.5 a clock, against 436 M and 67 M operations at 4,269 a clock.
    assert prefill_share(write) == pytest.approx(4480 / ((436.2e6 + 67.1e6) / 4269), rel=1e-3)
    assert prefill_share(write, chunk=1) == pytest.approx(4480 / (436.2e6 / 4269), rel=1e-3)
