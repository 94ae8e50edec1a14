"""The doctor says what a starting server would do, with an exit status for scripts."""

from __future__ import annotations

import json

import pytest

from sglang_spark import doctor, environment
from sglang_spark.refusals import REFUSALS

PER_HEAD = 4 * 2


def _run(capsys, *arguments: str) -> tuple[int, dict]:
    status = doctor.main([*arguments, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_environment_alone(capsys):
    status, report = _run(capsys)
    assert status == doctor.SERVES
    assert report["model"] is None
    names = [check["name"] for check in report["environment"]]
    assert {"python", "sglang", "torch", "triton", "numba", "plugin", "device"} <= set(names)
    assert all(check["ok"] for check in report["environment"]), report


def test_sizes_of_a_model_that_fits(capsys, model_folder):
    status, report = _run(capsys, "--model-path", str(model_folder("llama")), "--mem", "0.5", "--page-size", "16")
    assert status == doctor.SERVES
    sizes = {"dense": PER_HEAD * 512, "dense_fp8": PER_HEAD * 256, "spark": PER_HEAD * 136}
    assert report["model"]["bytes_per_token"] == sizes
    assert report["model"]["tokens"] == {cache: (1 << 29) // size // 16 * 16 for cache, size in sizes.items()}
    assert report["model"]["summary"]["kept_key_channels"] == 6


def test_flags_of_the_server_count(capsys, model_folder):
    flags = ("--spark-dense-layers", "0", "--spark-value-dtype", "auto")
    flags = (*flags, "--kv-cache-dtype", "fp8_e4m3", "--tp-size", "2")
    status, report = _run(capsys, "--model-path", str(model_folder("llama")), *flags)
    assert status == doctor.SERVES
    # One of two KV heads per process.
    assert report["model"]["bytes_per_token"]["spark"] == (256 + 3 * 64) + 4 * 128
    assert report["model"]["tokens"] is None


def test_a_refusal_gives_the_table_s_reason(capsys, model_folder):
    refusal = next(row for row in REFUSALS if row.setting == "model with multi-head latent attention")
    status, report = _run(capsys, "--model-path", str(model_folder("deepseek-mla")))
    assert status == doctor.REFUSED
    assert refusal.why in report["model"]["refusal"]
    assert refusal.instead in report["model"]["refusal"]


def test_a_setting_out_of_range_is_refused(capsys, model_folder):
    status, report = _run(capsys, "--model-path", str(model_folder("llama")), "--spark-key-ratio", "0.995")
    assert status == doctor.REFUSED
    assert "--spark-key-ratio=0.995" in report["model"]["refusal"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model-path", "/no/such/model"), "--model-path=/no/such/model"),
        (("--mem", "4"), "--mem needs --model-path"),
        (("--spark-key-ratio", "0.5"), "--spark-key-ratio 0.5 needs --model-path"),
        (("--model-path", "{llama}", "--mem", "-1"), "--mem=-1: must be above 0"),
        (("--model-path", "{llama}", "--spark-restore-bits", "two"), "invalid float value: 'two'"),
        (("--model-path", "{llama}", "--spark-key-rato", "0.5"), "--spark-key-rato"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_usage(arguments, message, capsys, model_folder):
    with pytest.raises(SystemExit) as exit:
        doctor.main([argument.format(llama=model_folder("llama")) for argument in arguments])
    assert exit.value.code == doctor.BAD_USAGE
    assert message in capsys.readouterr().err


def test_a_missing_or_outdated_package_is_named(capsys, monkeypatch):
    wanted = ["sglang<0.4", "no-such-package>=1", "numpy"]
    monkeypatch.setattr(environment, "requires", lambda distribution: wanted)
    status, report = _run(capsys)
    assert status == doctor.REFUSED
    failed = {check["name"]: check["detail"] for check in report["environment"] if not check["ok"]}
    assert failed["sglang"].endswith("needs <0.4")
    assert failed["no-such-package"] == "not installed, needs >=1"
    assert set(failed) == {"sglang", "no-such-package"}


def test_a_lost_hook_is_named(capsys, monkeypatch, model_folder):
    from sglang.srt.managers.scheduler import Scheduler

    monkeypatch.delattr(Scheduler, "get_internal_state")
    status, report = _run(capsys, "--model-path", str(model_folder("llama")))
    assert status == doctor.REFUSED
    (failed,) = [check for check in report["environment"] if not check["ok"]]
    assert "Scheduler.get_internal_state is missing" in failed["detail"]


def test_tables_for_people(capsys, model_folder):
    assert doctor.main(["--model-path", str(model_folder("llama")), "--mem", "1"]) == doctor.SERVES
    printed = capsys.readouterr().out
    assert "bytes per token" in printed and "3.76x" in printed and "tokens in 1 GiB" in printed
    assert "would serve" in printed


def test_window_layers_take_their_share_of_the_memory(capsys, model_folder):
    """As the server divides it: so many tokens of windows for each of the other layers'."""
    flags = ("--model-path", str(model_folder("gemma3")), "--mem", "0.5", "--swa-full-tokens-ratio", "0.25")
    _, report = _run(capsys, *flags)
    sizes, windows = report["model"]["bytes_per_token"], 2 * 2 * 2 * 64 * 2
    assert report["model"]["summary"]["window_bytes_per_token"] == windows
    assert sizes["dense"] == windows
    for cache, tokens in report["model"]["tokens"].items():
        assert tokens == int((1 << 29) // (sizes[cache] + 0.25 * windows))
    assert doctor.main(list(flags)) == doctor.SERVES
    assert "beside them, in windows" in capsys.readouterr().out
