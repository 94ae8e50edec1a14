"""The plugin is found, applied once, and a process in which it was not applied does not serve."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest

from sglang_spark import plugin
from sglang_spark.attention.backend import SparkAttnBackend
from sglang_spark.hooks import HOOKS
from sglang_spark.targets import Target


def test_entry_point_names_register():
    found = entry_points(group="sglang.srt.plugins", name="spark")
    assert [entry.load() for entry in found] == [plugin.register]


def test_every_hook_is_applied():
    plugin.check_installed()


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target.path.rpartition(".")[2])
def test_a_hook_that_another_s_wrapper_replaces_is_named(hook, monkeypatch):
    owner, _, attribute = hook.target.path.rpartition(".")
    other = functools.wraps(lambda *args: None)(lambda *args: None)
    monkeypatch.setattr(Target(owner).current(), attribute, staticmethod(other))
    with pytest.raises(RuntimeError, match=hook.target.path):
        plugin.check_installed()


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target.path.rpartition(".")[2])
def test_a_hook_below_another_s_wrapper_is_found(hook, monkeypatch):
    owner, _, attribute = hook.target.path.rpartition(".")
    current = Target(owner).current().__dict__[attribute]
    inner = current.__func__ if isinstance(current, (staticmethod, classmethod)) else current
    outer = functools.wraps(inner)(lambda *args: inner(*args))
    monkeypatch.setattr(Target(owner).current(), attribute, outer)
    assert hook.is_applied()


def test_backend_refuses_a_dense_pool():
    runner = SimpleNamespace(token_to_kv_pool=object())
    with pytest.raises(RuntimeError, match=r"needs a SparkTokenToKVPool.*--kv-compress spark"):
        SparkAttnBackend(runner)
