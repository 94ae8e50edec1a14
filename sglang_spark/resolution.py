"""What SparK adds to SGLang's resolution of arguments: refusals, and the choice of its backend."""

from __future__ import annotations

from typing import Any

from sglang_spark import refusals
from sglang_spark.adapters import arguments
from sglang_spark.calibration import AUTO, checked_source
from sglang_spark.conditions import BACKEND, Launch
from sglang_spark.config import DEFAULT_KEY_RATIO, DEFAULT_VALUE_DTYPE, SparkConfig
from sglang_spark.server_args import KV_COMPRESS_CHOICES


def check_request(server_args: Any, previous: Any) -> None:
    """Wraps SGLang's step ``handle_missing_default_values``, the first after which device and model are known.

    Refusing here comes before SGLang adjusts anything to the model, so the user reads SparK's reason.

    Raises
    ------
    ValueError
        SparK was asked for and cannot be honoured, or was not asked for and has settings.
    """
    previous(server_args)
    requested = arguments.requested(server_args)
    if requested["kv_compress"] not in KV_COMPRESS_CHOICES:
        raise ValueError(f"--kv-compress={requested['kv_compress']}: use one of {', '.join(KV_COMPRESS_CHOICES)}")
    if requested["kv_compress"] == "none":
        _check_nothing_spark_was_asked(requested)
    else:
        _check_possible(server_args)


def choose_backend(server_args: Any, previous: Any) -> None:
    """Wraps SGLang's step ``handle_attention_backend_compatibility``: with SparK, its backend is the only one.

    Raises
    ------
    ValueError
        What SGLang resolved since `check_request` makes SparK impossible.
    """
    if server_args.kv_compress == "spark":
        _check_possible(server_args)
        arguments.declare(
            server_args,
            attention_backend=BACKEND,
            prefill_attention_backend=None,
            decode_attention_backend=None,
        )
    previous(server_args)


def _check_possible(server_args: Any) -> None:
    model_config = arguments.model_config(server_args)
    launch = Launch(arguments.requested(server_args), arguments.resolved(server_args), model_config)
    refusals.check(launch)
    SparkConfig.of(server_args, model_config)
    checked_source(server_args.spark_calibration, model_config)


def _check_nothing_spark_was_asked(requested: dict[str, Any]) -> None:
    """A SparK setting without ``--kv-compress spark`` is a mistake that would serve dense."""
    set_anyway = {
        "--spark-key-ratio": requested["spark_key_ratio"] != DEFAULT_KEY_RATIO,
        "--spark-restore-bits": requested["spark_restore_bits"] is not None,
        "--spark-dense-layers": requested["spark_dense_layers"] != "",
        "--spark-value-dtype": requested["spark_value_dtype"] != DEFAULT_VALUE_DTYPE,
        "--spark-calibration": requested["spark_calibration"] != AUTO,
        "--attention-backend spark": BACKEND
        in (
            requested["attention_backend"],
            requested["prefill_attention_backend"],
            requested["decode_attention_backend"],
        ),
    }
    flags = [flag for flag, is_set in set_anyway.items() if is_set]
    if flags:
        raise ValueError(f"{', '.join(flags)}: has no effect without --kv-compress spark; add it")
