"""The flags reach SGLang from the command line, from YAML and from Engine keywords, and are off by default."""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys

import pytest
from sglang.srt import server_args
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import prepare_server_args

from sglang_spark.config import parse_layers
from sglang_spark.server_args import DEFAULTS, SparkServerArgs, is_spark, published

FIELDS = ("kv_compress", "spark_key_ratio", "spark_restore_bits", "spark_dense_layers", "spark_value_dtype")


def test_without_a_flag_arguments_are_sglang_s_own(resolve, model_folder):
    arguments = prepare_server_args(["--model-path", str(model_folder("llama"))])
    assert type(arguments) is server_args.ServerArgs
    resolved = resolve()
    assert resolved["attention_backend"] != "spark" and DEFAULTS.keys().isdisjoint(resolved)


def test_the_switch_alone_means_the_defaults(resolve):
    resolved = resolve("--kv-compress", "spark")
    assert [resolved[field] for field in FIELDS] == ["spark", 0.96, None, "", "int4"]


def test_command_line(resolve):
    resolved = resolve(
        *("--kv-compress", "spark", "--spark-key-ratio", "0.6"),
        *("--spark-restore-bits", "2.5", "--spark-dense-layers", "0,2-3"),
        *("--spark-value-dtype", "int3"),
    )
    assert [resolved[field] for field in FIELDS] == ["spark", 0.6, 2.5, "0,2-3", "int3"]
    assert resolved["attention_backend"] == "spark"


@pytest.mark.parametrize(
    ("layers", "read"),
    [("0-1", (0, 1)), ("[0, 3]", (0, 3)), ("0", (0,)), ("'0,2-3'", (0, 2, 3)), ("[0, 2-3]", (0, 2, 3))],
)
def test_yaml_config(layers, read, model_folder, tmp_path):
    arguments = _from_yaml(
        tmp_path,
        f"model-path: {model_folder('llama')}",
        "kv-compress: spark\nspark-key-ratio: 0.7\nspark-restore-bits: 0",
        f"spark-dense-layers: {layers}\nspark-value-dtype: auto",
    )
    arguments.resolve_once()
    assert (arguments.kv_compress, arguments.spark_key_ratio, arguments.spark_value_dtype) == ("spark", 0.7, "auto")
    assert parse_layers(arguments.spark_dense_layers, 4) == read


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("kv-compress: no", "--kv-compress: invalid choice: 'false'"),
        ("kv-compress: null", "--kv-compress: invalid choice: 'None'"),
        ("kv-compress: spark\nspark-key-ratio: null", "--spark-key-ratio: invalid float value: 'None'"),
        ("kv-compress: spark\nspark-restore-bits: [2, 3]", "unrecognized arguments: 3"),
        ("kv_compress: spark", "unrecognized arguments: --kv_compress spark"),
    ],
)
def test_what_yaml_makes_of_a_value_is_refused_in_terms_of_the_flag(line, message, model_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        _from_yaml(tmp_path, f"model-path: {model_folder('llama')}", line)
    assert message in capsys.readouterr().err


def _from_yaml(tmp_path, *lines: str):
    config = tmp_path / "config.yaml"
    config.write_text("\n".join(lines) + "\n")
    return prepare_server_args(["--config", str(config)])


@pytest.mark.parametrize("model_class", [server_args.ServerArgs, SparkServerArgs])
def test_engine_keywords(model_class, model_folder):
    from sglang.srt.entrypoints.engine import Engine

    keywords = {"kv_compress": "spark", "spark_key_ratio": "0.9"} if model_class is SparkServerArgs else {}
    arguments = Engine.server_args_class(model_path=str(model_folder("llama")), **keywords)
    assert type(arguments) is model_class
    assert {name: getattr(arguments, name) for name in keywords} == keywords


@pytest.mark.parametrize(
    "keywords",
    [
        {"spark_key_ratio": "0.8"},
        {"spark_restore_bits": "2"},
        {"spark_restore_bits": 2.0},
        {"spark_dense_layers": [0, 1]},
        {"spark_dense_layers": 0},
        {"spark_dense_layers": ["0", "2-3"]},
    ],
    ids=str,
)
def test_keywords_of_other_types_that_say_the_same(keywords, model_folder):
    SparkServerArgs(model_path=str(model_folder("llama")), kv_compress="spark", **keywords).resolve_once()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"spark_key_ratio": "much"}, "--spark-key-ratio='much': is not a number"),
        ({"spark_key_ratio": None}, "--spark-key-ratio=None: is not a number"),
        ({"spark_key_ratio": float("nan")}, "--spark-key-ratio=nan"),
        ({"spark_restore_bits": True}, "--spark-restore-bits=True: is not a number"),
        ({"spark_dense_layers": None}, "--spark-dense-layers='None'"),
        ({"spark_dense_layers": 1.5}, "--spark-dense-layers='1.5'"),
        ({"spark_value_dtype": None}, "--spark-value-dtype=None"),
        ({"kv_compress": "sparks"}, "--kv-compress=sparks: use one of none, spark"),
        ({"kv_compress": True}, "--kv-compress=True: use one of none, spark"),
    ],
    ids=str,
)
def test_keywords_that_say_nothing_are_refused_in_terms_of_the_flag(keywords, message, model_folder):
    arguments = SparkServerArgs(**{"model_path": str(model_folder("llama")), "kv_compress": "spark", **keywords})
    with pytest.raises(ValueError, match=message):
        arguments.resolve_once()


class OwnArgs(server_args.ServerArgs, dict=True):
    """What another program may derive."""


def test_a_program_with_arguments_of_its_own_serves_dense(model_folder):
    parser = argparse.ArgumentParser()
    OwnArgs.add_cli_args(parser)
    arguments = OwnArgs.from_cli_args(parser.parse_args(["--model-path", str(model_folder("llama"))]))
    assert type(arguments) is OwnArgs
    publish(arguments, role="scheduler")
    assert not is_spark(published())
    compressed = parser.parse_args(["--model-path", str(model_folder("llama")), "--kv-compress", "spark"])
    with pytest.raises(ValueError, match=r"--kv-compress: .*OwnArgs.*derive it from .*SparkServerArgs"):
        OwnArgs.from_cli_args(compressed)


ARGUMENTS_BEFORE_PLUGINS = """
import pickle, sys
from sglang.srt.server_args import ServerArgs, prepare_server_args
made = ServerArgs(model_path=sys.argv[1], device="cpu")
parsed = prepare_server_args(["--model-path", sys.argv[1], "--device", "cpu"])
parsed.resolve_once()
from sglang.srt.plugins import load_plugins
load_plugins()
import sglang.srt.server_args
assert sglang.srt.server_args.ServerArgs is ServerArgs
from sglang.srt.runtime_context import publish
from sglang_spark.server_args import is_spark, published
for arguments in (made, parsed):
    arguments = pickle.loads(pickle.dumps(arguments))
    publish(arguments, role="scheduler")
    assert published() is arguments and not is_spark(arguments)
print("DENSE")
"""


def test_arguments_made_before_plugins_load_serve_dense(model_folder):
    command = [sys.executable, "-c", ARGUMENTS_BEFORE_PLUGINS, str(model_folder("llama"))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.endswith("DENSE\n"), result.stderr


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
