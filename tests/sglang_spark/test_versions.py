"""Which SGLang releases the plugin accepts: those it was run with, and others that have all it needs."""

from __future__ import annotations

import importlib
import logging

import pytest

import setup_env
from setup_env import SetupError
from sglang_spark import adapters, plugin
from sglang_spark.adapters import targets
from sglang_spark.adapters.targets import Target, UnsupportedSGLangError, check_release, warn_of_release
from sglang_spark.releases import MAIN, RUN_WITH

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


@pytest.mark.parametrize("refuse", [lambda: importlib.reload(adapters), plugin.register], ids=["import", "register"])
def test_an_unknown_release_without_something_that_is_called_or_hooked_gets_no_plugin(refuse, monkeypatch):
    """Through the real tables: SGLang's plugin loader imports the one module and calls the other."""
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator

    monkeypatch.setattr(targets, "RUN_WITH", ())
    monkeypatch.delattr(AttentionBackend, "init_cuda_graph_state")
    monkeypatch.delattr(KVCacheConfigurator, "_build_mha_kv_pool")
    with pytest.raises(UnsupportedSGLangError, match=r"AttentionBackend\.init_cuda_graph_state is missing") as refusal:
        refuse()
    hooked = "KVCacheConfigurator._build_mha_kv_pool is missing"
    assert (hooked in str(refusal.value)) == (refuse is plugin.register)


@pytest.mark.parametrize("release", RUN_WITH)
def test_a_release_s_own_pins_take_the_place_of_the_main_ones(release):
    main, own = setup_env.cpu_requirements(MAIN), setup_env.cpu_requirements(release)
    file = setup_env.ROOT / "requirements" / f"cpu-{release}.txt"
    pins = file.read_text().split() if file.exists() else []
    assert len(own) == len(main)
    assert set(own) - set(main) == set(pins)
    assert f"sglang=={release}" in setup_env.cpu_steps(release)[2][1]


def test_a_release_that_needs_a_patch_is_told_apart_from_one_that_does_not():
    what_a_cpu_host_needs = [" ".join(setup_env.cpu_steps(release)[3][1]) for release in (MAIN, "0.5.10.post1")]
    assert ["sgl_kernel" in arguments for arguments in what_a_cpu_host_needs] == [False, True]


@pytest.mark.parametrize(("installed", "result"), [("old", "new"), ("new", "new"), ("other", SetupError)])
def test_a_patch_is_applied_once(installed, result, tmp_path):
    module = tmp_path / "lib" / "python3.11" / "site-packages" / "sglang" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text(f"{installed}\n")
    patch = tmp_path / "1.0.patch"
    patch.write_text("--- a/sglang/module.py\n+++ b/sglang/module.py\n@@ -1 +1 @@\n-old\n+new\n")
    if result is SetupError:
        with pytest.raises(SetupError, match=r"1\.0\.patch does not apply"):
            setup_env.apply_patch(tmp_path, patch)
    else:
        setup_env.apply_patch(tmp_path, patch)
        assert module.read_text() == f"{result}\n"
