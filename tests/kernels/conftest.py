import os
import random

import pytest
import torch

SEED = int(os.environ.get("SPARK_TEST_SEED", random.randrange(2**31)))


def pytest_report_header() -> str:
    return f"inputs of tests/kernels: SPARK_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    """New random inputs in every run; set SPARK_TEST_SEED to the printed number to repeat one."""
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty starts as NaN, so that an output nobody wrote cannot pass by luck."""

    def poisoned(empty):
        def allocate(*args, **kwargs) -> torch.Tensor:
            tensor = empty(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.dtype.is_floating_point else tensor.fill_(1)

        return allocate

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
