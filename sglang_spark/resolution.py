"""What SparK adds to SGLang's resolution of arguments: refusals, and the choice of its backend."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view

from sglang_spark import hybrid, refusals
from sglang_spark.calibration import checked_source
from sglang_spark.conditions import BACKEND, Launch
from sglang_spark.config import SparkConfig
from sglang_spark.server_args import DEFAULTS, KV_COMPRESS_CHOICES, is_spark


def check_request(server_args: Any, previous: Any) -> None:
    """Wraps SGLang's step ``handle_missing_default_values``, the first after which device and model are known.

    Refusing here comes before SGLang adjusts anything to the model, so the user reads SparK's reason.

    Raises
    ------
    ValueError
        SparK was asked for and cannot be honoured, or was not asked for and has settings.
    """
    previous(server_args)
    asked = server_args._raw_input.get("kv_compress", "none")
    if asked not in KV_COMPRESS_CHOICES:
        raise ValueError(f"--kv-compress={asked}: use one of {', '.join(KV_COMPRESS_CHOICES)}")
    if asked == "none":
        _check_nothing_spark_was_asked(server_args._raw_input)
    else:
        _check_possible(server_args)


def choose_backend(server_args: Any, previous: Any) -> None:
    """Wraps SGLang's step ``handle_attention_backend_compatibility``: with SparK, its backend is the only one.

    Raises
    ------
    ValueError
        What SGLang resolved since `check_request` makes SparK impossible.
    """
    if is_spark(server_args):
        _check_possible(server_args)
        declare_resolution(
            server_args,
            hybrid.SOURCE,
            spark_window_backend=hybrid.window_backend(server_args),
            attention_backend=BACKEND,
            prefill_attention_backend=None,
            decode_attention_backend=None,
        )
    previous(server_args)


def _check_possible(server_args: Any) -> None:
    hybrid.split_pool(server_args)
    model_config = model_config_of(server_args)
    refusals.check(Launch(server_args, server_args._raw_input, resolving_view(server_args), model_config))
    SparkConfig.of(server_args, model_config)
    checked_source(server_args.spark_calibration, model_config)


def _check_nothing_spark_was_asked(requested: dict[str, Any]) -> None:
    """A SparK setting without ``--kv-compress spark`` is a mistake that would serve dense."""
    flags = [
        f"--{name.replace('_', '-')}" for name, default in DEFAULTS.items() if requested.get(name, default) != default
    ]
    backends = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
    flags += [f"--{name.replace('_', '-')} {BACKEND}" for name in backends if requested[name] == BACKEND]
    if flags:
        raise ValueError(f"{', '.join(flags)}: has no effect without --kv-compress spark; add it")
