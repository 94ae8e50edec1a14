"""Which SGLang releases the plugin accepts: those it was run with, and others that have all it needs."""

from __future__ import annotations

import logging
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

import setup_env
from sglang_spark import plugin, targets
from sglang_spark.releases import MAIN, RUN_WITH
from sglang_spark.targets import Target, UnsupportedSGLangError, check_release, warn_of_release

UNKNOWN = "0.99.0"
THERE = Target("logging.getLogger", ("name",))


def test_an_unknown_release_with_everything_in_place_is_accepted_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        check_release(UNKNOWN, [THERE])
        warn_of_release(UNKNOWN)
    (record,) = caplog.records
    assert f"has not been run with SGLang {UNKNOWN}" in record.message


def test_an_unknown_release_is_refused_with_everything_it_lacks():
    wrong = [Target("logging.no_such_name"), Target("logging.getLogger", ("level",)), Target("no_such_package.x")]
    with pytest.raises(UnsupportedSGLangError, match=f"does not work with SGLang {UNKNOWN}") as refusal:
        check_release(UNKNOWN, [THERE, *wrong])
    assert all(target.problem() in str(refusal.value) for target in wrong)
    assert THERE.path not in str(refusal.value).replace(wrong[1].problem(), "")


@pytest.mark.parametrize("release", RUN_WITH)
def test_a_release_that_was_run_is_not_questioned(release, caplog):
    check_release(release, [Target("logging.no_such_name")])
    warn_of_release(release)
    assert not caplog.records


@pytest.mark.parametrize("owner", ["AttentionBackend", "KVCacheConfigurator"], ids=["called", "hooked"])
def test_an_unknown_release_without_something_that_is_called_or_hooked_gets_no_plugin(owner, monkeypatch):
    """Through the real tables."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    attribute = {AttentionBackend: "init_cuda_graph_state", KVCacheConfigurator: "_build_mha_kv_pool"}
    (cls,) = (cls for cls in attribute if cls.__name__ == owner)
    monkeypatch.setattr(targets, "RUN_WITH", ())
    monkeypatch.delattr(cls, attribute[cls])
    with pytest.raises(UnsupportedSGLangError, match=rf"{owner}\.{attribute[cls]} is missing"):
        plugin.register()


@pytest.mark.parametrize("release", RUN_WITH)
def test_a_release_s_own_pins_take_the_place_of_the_main_ones(release):
    main, own = setup_env.cpu_requirements(MAIN), setup_env.cpu_requirements(release)
    file = setup_env.ROOT / "requirements" / f"cpu-{release}.txt"
    pins = file.read_text().split() if file.exists() else []
    assert len(own) == len(main)
    assert set(own) - set(main) == set(pins)
    assert f"sglang=={release}" in setup_env.cpu_steps(release)[2][1]


@pytest.mark.parametrize("newer", ["0.5.24", "0.6.0", "1.0"])
def test_pip_leaves_a_newer_sglang_alone(newer):
    (wanted,) = (Requirement(text) for text in requires("sglang-spark") if Requirement(text).name == "sglang")
    assert wanted.specifier.contains(newer) and not wanted.specifier.contains("0.5.19")
