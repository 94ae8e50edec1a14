"""The flags reach SGLang from the command line, from YAML and from Engine keywords, and are off by default."""

from __future__ import annotations

import pickle

import pytest
from sglang.srt import server_args
from sglang.srt.server_args import prepare_server_args

FIELDS = ("kv_compress", "spark_key_ratio", "spark_restore_bits", "spark_dense_layers", "spark_value_dtype")


def test_defaults_are_off(resolve):
    resolved = resolve()
    assert [resolved[field] for field in FIELDS] == ["none", 0.96, None, "", "int4"]
    assert resolved["attention_backend"] != "spark"


def test_command_line(resolve):
    resolved = resolve(
        *("--kv-compress", "spark", "--spark-key-ratio", "0.6"),
        *("--spark-restore-bits", "2.5", "--spark-dense-layers", "0,2-3"),
        *("--spark-value-dtype", "int3"),
    )
    assert [resolved[field] for field in FIELDS] == ["spark", 0.6, 2.5, "0,2-3", "int3"]
    assert resolved["attention_backend"] == "spark"


def test_yaml_config(model_folder, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model-path: {model_folder('llama')}\n"
        "kv-compress: spark\nspark-key-ratio: 0.7\nspark-restore-bits: 0\nspark-dense-layers: 0-1\n"
        "spark-value-dtype: auto\n"
    )
    arguments = prepare_server_args(["--config", str(config)])
    assert [getattr(arguments, field) for field in FIELDS] == ["spark", 0.7, 0, "0-1", "auto"]


def test_engine_keywords(model_folder):
    from sglang.srt.entrypoints.engine import Engine

    arguments = Engine.server_args_class(
        model_path=str(model_folder("llama")), kv_compress="spark", spark_key_ratio=0.9
    )
    assert (arguments.kv_compress, arguments.spark_key_ratio) == ("spark", 0.9)


def test_settings_survive_the_way_to_a_scheduler_process(model_folder):
    arguments = prepare_server_args(["--model-path", str(model_folder("llama")), "--kv-compress", "spark"])
    arguments.resolve_once()
    arrived = pickle.loads(pickle.dumps(arguments)).resolved_dict()
    assert arrived["kv_compress"] == "spark"
    assert arrived["attention_backend"] == "spark"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--spark-key-ratio", "0.5"), "--spark-key-ratio.*without --kv-compress spark"),
        (("--spark-restore-bits", "1"), "--spark-restore-bits.*without --kv-compress spark"),
        (("--spark-dense-layers", "0"), "--spark-dense-layers.*without --kv-compress spark"),
        (("--spark-value-dtype", "int3"), "--spark-value-dtype.*without --kv-compress spark"),
        (("--attention-backend", "spark"), "--attention-backend spark.*without --kv-compress spark"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_settings_without_the_switch_are_refused(flags, message, resolve):
    with pytest.raises(ValueError, match=message):
        resolve(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--spark-key-ratio", "0.995"), r"--spark-key-ratio=0.995.*to 0\.99"),
        (("--spark-restore-bits", "4.5"), r"--spark-restore-bits=4.5.*use one of 0, .*, 4"),
        (("--spark-restore-bits", "2.9"), r"--spark-restore-bits=2.9.*use one of 0, .*, 4"),
        (("--spark-dense-layers", "4"), r"layer 4 does not exist, the model has layers 0 to 3"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_settings_out_of_range_are_refused(flags, message, resolve):
    with pytest.raises(ValueError, match=message):
        resolve("--kv-compress", "spark", *flags)


@pytest.mark.parametrize("model", ["llama-head-dim-72", "llama-head-dim-512"])
def test_head_dim_out_of_range_is_refused(model, resolve):
    with pytest.raises(ValueError, match="multiple of 16 from 16 to 256"):
        resolve("--kv-compress", "spark", model=model)


@pytest.mark.parametrize("flags", [("--kv-compress", "sparks"), ("--spark-value-dtype", "int8")], ids=str)
def test_unknown_choices_are_refused_by_the_parser(flags, resolve, capsys):
    with pytest.raises(SystemExit):
        resolve("--kv-compress", "spark", *flags)
    assert "invalid choice" in capsys.readouterr().err


def test_unknown_choice_as_engine_keyword_is_refused(model_folder):
    arguments = server_args.ServerArgs(model_path=str(model_folder("llama")), kv_compress="sparks")
    with pytest.raises(ValueError, match="--kv-compress=sparks: use one of none, spark"):
        arguments.resolve_once()
