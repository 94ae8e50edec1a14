"""A hook whose target has moved or changed its parameters is told apart from one that will work."""

from __future__ import annotations

import pytest
from sglang.srt.plugins.hook_registry import HookType

from sglang_spark import plugin, targets
from sglang_spark.plugin import Hook


class Target:
    def as_expected(self, batch, *, size): ...
    def renamed(self, forward_batch, *, size): ...
    def one_more(self, batch, *, size, quantizer=None): ...


def closed(original, target, batch, *, size): ...


def open_ended(original, target, batch, *args, **kwargs): ...


@pytest.mark.parametrize("hook", plugin.HOOKS, ids=lambda hook: hook.target.rpartition(".")[2])
def test_every_hook_fits_the_installed_sglang(hook):
    assert targets.problem(hook) is None


@pytest.mark.parametrize(
    ("target", "replacement", "problem"),
    [
        ("as_expected", closed, None),
        ("as_expected", open_ended, None),
        ("one_more", open_ended, None),
        ("one_more", closed, "has parameters SparK does not know: quantizer"),
        ("renamed", closed, "has no parameter batch"),
        ("renamed", open_ended, "has no parameter batch"),
        ("gone", closed, "does not exist"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_problem(target, replacement, problem):
    found = targets.problem(Hook(f"{__name__}.Target.{target}", replacement, HookType.AROUND, "a test"))
    assert found is None if problem is None else problem in found
