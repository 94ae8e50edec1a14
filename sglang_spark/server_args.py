"""The command-line flags, as fields of SGLang's own argument record."""

from __future__ import annotations

from typing import Literal, get_args

from sglang.srt.server_args import ServerArgs

from sglang_spark.adapters import arguments
from sglang_spark.calibration import AUTO as DEFAULT_CALIBRATION
from sglang_spark.config import DEFAULT_KEY_RATIO, DEFAULT_VALUE_DTYPE

A, Arg = arguments.annotation()
KvCompress = Literal["none", "spark"]
KV_COMPRESS_CHOICES: tuple[str, ...] = get_args(KvCompress)


@arguments.complete
class SparkServerArgs(ServerArgs, **arguments.CLASS_KEYWORDS):
    """SGLang's server arguments and six more.

    Being fields of the record makes them command-line flags, keys of ``--config`` files, keywords of ``sgl.Engine``
    and part of ``/server_info``; every process reads them as ``get_memory().kv_compress`` and so on. The class is
    importable by name because the record travels to the scheduler processes by pickle.
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
        str,
        Arg(help="Layers that keep whole keys, as numbers and ranges: '0,1,30-31'. Empty for none."),
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
