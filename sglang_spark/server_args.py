"""The command-line flags: a record of SGLang's arguments with seven fields more, made where somebody asks for SparK.

SGLang's own class stays what and where it is. Its parser learns the flags, and arguments that use one become a
`SparkServerArgs`; all others are made by SGLang as if this package were not installed.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from sglang.srt.arg_groups.arg_utils import A, Arg, add_cli_args_from_dataclass, record_fields
from sglang.srt.server_args import ServerArgs

from sglang_spark.calibration import AUTO as DEFAULT_CALIBRATION
from sglang_spark.config import DEFAULT_KEY_RATIO, DEFAULT_VALUE_DTYPE
from sglang_spark.hybrid import WINDOW_BACKENDS

KvCompress = Literal["none", "spark"]
KV_COMPRESS_CHOICES: tuple[str, ...] = get_args(KvCompress)


class SparkServerArgs(ServerArgs, dict=True):
    """SGLang's server arguments and seven more, for ``sgl.Engine(server_args=...)`` and programs that launch servers.

    Being fields of the record makes them keys of ``--config`` files, keywords of ``sgl.Engine`` and part of
    ``/server_info``. The class is importable by name because the record travels to scheduler processes by pickle.
    """

    _NS_PATH = "memory"

    kv_compress: A[
        KvCompress,
        Arg(
            help="Compression of the KV cache. 'spark' prunes each cached key to the channels that matter and "
            "restores the others approximately while attention scores are computed (arXiv 2508.15212)."
        ),
    ] = "none"
    spark_key_ratio: A[
        float,
        Arg(
            help="Share of key channels that SparK does not keep exactly, up to 0.99; 0 stores whole keys (lossless "
            "with --spark-value-dtype auto). At the default, 6 of 128 channels are kept and a key takes 64 bytes "
            "instead of 256."
        ),
    ] = DEFAULT_KEY_RATIO
    spark_restore_bits: A[
        float | None,
        Arg(
            help="Bits per channel, on average, from which the other channels are restored: 0 to 4, in steps that "
            "depend on head_dim. 3 from head_dim 128 on and 4 below, if not given."
        ),
    ] = None
    spark_dense_layers: A[
        str | list,
        Arg(help="Layers that keep whole keys, as numbers and ranges: '0,1,30-31'. Empty for none.", nargs="+"),
    ] = ""
    spark_value_dtype: A[
        Literal["auto", "int4", "int3"],
        Arg(
            help="How values are stored: in 4 or 3 bits a channel after a Hadamard transform (72 or 56 bytes instead "
            "of 256 at head_dim 128), or 'auto': as --kv-cache-dtype says."
        ),
    ] = DEFAULT_VALUE_DTYPE
    spark_calibration: A[
        str,
        Arg(
            help="Where the statistics of keys come from that rows are made with: 'auto' measures them at start-up on "
            "a short text, a path names a file made by python -m sglang_spark.calibrate. Servers that exchange rows "
            "need the same file."
        ),
    ] = DEFAULT_CALIBRATION
    spark_window_backend: A[
        str | None,
        Arg(
            help="Which of SGLang's attention backends serves the layers of a model that attend to a window; their "
            "cache stays dense. SGLang's own choice for GPU and model if not given.",
            choices=WINDOW_BACKENDS,
        ),
    ] = None


_OF_SGLANG = {field.name for field in record_fields(ServerArgs)}
# Defaults by name, of the fields that are ours.
DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in record_fields(SparkServerArgs) if field.name not in _OF_SGLANG
}


def add_flags(_, parser):
    """After ``ServerArgs.add_cli_args``: SparK's flags beside SGLang's."""
    add_cli_args_from_dataclass(parser, SparkServerArgs, fields=list(DEFAULTS))


def record_of_flags(original, cls, args):
    """Around ``ServerArgs.from_cli_args``: a record that has SparK's fields if the command line uses one.

    Raises
    ------
    ValueError
        It does, and the record is to be of a class that does not have them.
    """
    if isinstance(getattr(args, "spark_dense_layers", ""), list):
        args.spark_dense_layers = ",".join(args.spark_dense_layers)
    used = [name for name, default in DEFAULTS.items() if getattr(args, name, default) != default]
    if not used or issubclass(cls, SparkServerArgs):
        return original(cls, args)
    if cls is not ServerArgs:
        raise ValueError(
            f"--{used[0].replace('_', '-')}: the arguments of this program are a {cls.__module__}.{cls.__qualname__}, "
            "which has no such field; derive it from sglang_spark.server_args.SparkServerArgs"
        )
    return original(SparkServerArgs, args)


def record_of_keywords(**keywords):
    """What ``sgl.Engine(**keywords)`` makes its arguments with."""
    return (ServerArgs if DEFAULTS.keys().isdisjoint(keywords) else SparkServerArgs)(**keywords)


def teach_engine() -> None:
    """Let ``sgl.Engine`` take the keywords, unless its class of arguments has been replaced by another's."""
    from sglang.srt.entrypoints.engine import Engine

    if Engine.server_args_class is ServerArgs:
        Engine.server_args_class = staticmethod(record_of_keywords)


def is_spark(server_args: Any) -> bool:
    """Whether arguments ask for a compressed cache."""
    return getattr(server_args, "kv_compress", "none") == "spark"


def published() -> Any:
    """The record that this process was started with."""
    from sglang.srt.runtime_context import get_server_args

    return get_server_args()
