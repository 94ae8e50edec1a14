"""Which SGLang releases the plugin accepts: those it was run with, and others that have all it needs."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

import pytest

import setup_env
from sglang_spark import adapters, plugin
from sglang_spark.adapters import targets
from sglang_spark.adapters.targets import Target, UnsupportedSGLangError, check_release, warn_of_release
from sglang_spark.releases import MAIN, RUN_WITH

UNKNOWN = "0.99.0"


class Pool:
    def __init__(self, size, *, page_size): ...

    def move(self, target, source, *rest, **kwargs): ...


@pytest.fixture(autouse=True)
def fake_release(monkeypatch):
    """A module ``fake_sglang.pool`` with a class and a constant."""
    package, module = ModuleType("fake_sglang"), ModuleType("fake_sglang.pool")
    package.__path__ = []
    package.pool, module.Pool, module.ROWS = module, Pool, 7
    monkeypatch.setitem(sys.modules, "fake_sglang", package)
    monkeypatch.setitem(sys.modules, "fake_sglang.pool", module)
    return module


AS_EXPECTED = (
    Target("fake_sglang.pool.ROWS"),
    Target("fake_sglang.pool.Pool", ("size", "page_size")),
    Target("fake_sglang.pool.Pool.move", ("self", "target", "source", "*rest", "**kwargs")),
)


def test_an_unknown_release_with_everything_in_place_is_accepted_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        check_release(UNKNOWN, AS_EXPECTED)
        warn_of_release(UNKNOWN)
    (record,) = caplog.records
    assert f"has not been run with SGLang {UNKNOWN}" in record.message


@pytest.mark.parametrize(
    "path",
    ["fake_sglang.pool.Pool.copy", "fake_sglang.pool.OtherPool.move", "fake_sglang.pages.Pool", "no_such_package.x"],
)
def test_an_unknown_release_that_lacks_a_target_is_refused_by_name(path):
    with pytest.raises(UnsupportedSGLangError, match=rf"SGLang {UNKNOWN}:\n  {path} is missing"):
        check_release(UNKNOWN, (*AS_EXPECTED, Target(path)))


@pytest.mark.parametrize(
    "expected",
    [
        ("self", "target", "source"),
        ("self", "source", "target", "*rest", "**kwargs"),
        ("self", "target", "source", "rest", "kwargs"),
    ],
    ids=["fewer", "other-order", "no-stars"],
)
def test_an_unknown_release_with_another_signature_is_refused_with_both(expected):
    with pytest.raises(UnsupportedSGLangError) as refusal:
        check_release(UNKNOWN, [Target("fake_sglang.pool.Pool.move", expected)])
    message = str(refusal.value)
    assert "fake_sglang.pool.Pool.move takes (self, target, source, *rest, **kwargs)" in message
    assert f"instead of ({', '.join(expected)})" in message


def test_all_problems_are_reported_at_once():
    wrong = [Target("fake_sglang.a"), Target("fake_sglang.pool.Pool", ()), Target("fake_sglang.b")]
    with pytest.raises(UnsupportedSGLangError) as refusal:
        check_release(UNKNOWN, wrong)
    assert all(target.path in str(refusal.value) for target in wrong)


@pytest.mark.parametrize("release", RUN_WITH)
def test_a_release_that_was_run_is_not_questioned(release, caplog):
    check_release(release, [Target("fake_sglang.missing")])
    warn_of_release(release)
    assert not caplog.records


@pytest.mark.parametrize("target", adapters.TARGETS, ids=lambda target: target.path)
def test_the_installed_release_has_every_target(target):
    # Inspected as SGLang has it: a hook's own wrapper keeps the signature of what it wraps.
    assert target.problem() is None


def test_every_hook_is_a_target():
    checked = {target.path for target in adapters.TARGETS}
    assert {hook.target for hook in plugin.HOOKS} <= checked


def test_the_plugin_of_an_unknown_release_without_a_hook_target_does_not_load(monkeypatch):
    """Through the real tables: the refusal comes from the import that SGLang's plugin loader does."""
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    monkeypatch.setattr(targets, "RUN_WITH", ())
    monkeypatch.delattr(KVCacheConfigurator, "_build_mha_kv_pool")
    with pytest.raises(UnsupportedSGLangError, match=r"KVCacheConfigurator\._build_mha_kv_pool is missing"):
        importlib.reload(adapters)


@pytest.mark.parametrize("release", RUN_WITH)
def test_a_release_s_own_pins_take_the_place_of_the_main_ones(release):
    main, own = setup_env.cpu_requirements(MAIN), setup_env.cpu_requirements(release)
    file = setup_env.ROOT / "requirements" / f"cpu-{release}.txt"
    pins = file.read_text().split() if file.exists() else []
    assert len(own) == len(main)
    assert set(own) - set(main) == set(pins)
    assert f"sglang=={release}" in setup_env.cpu_steps(release)[2][1]
