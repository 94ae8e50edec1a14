"""The command-line flags, as fields of SGLang's own argument record."""

from __future__ import annotations

from typing import Literal, get_args

from sglang.srt.server_args import ServerArgs

from sglang_spark.adapters import arguments
from sglang_spark.calibration import AUTO as DEFAULT_CALIBRATION
from sglang_spark.config import DEFAULT_KEY_RATIO, DEFAULT_RESTORE_BITS, DEFAULT_VALUE_DTYPE

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
            help="Share of key channels that SparK drops, up to 0.95; 0 keeps whole keys (lossless). At the default, "
            "26 of 128 channels are kept and a key takes 88 bytes instead of 256."
        ),
    ] = DEFAULT_KEY_RATIO
    spark_restore_bits: A[
        Literal[0, 1, 2],
        Arg(
            help="Bits per channel from which dropped channels are restored: 2 (sign and magnitude), 1 (sign) or "
            "0 (they count as zero)."
        ),
    ] = DEFAULT_RESTORE_BITS
    spark_dense_layers: A[
        str,
        Arg(help="Layers that keep whole keys, as numbers and ranges: '0,1,30-31'. Empty for none."),
    ] = ""
    spark_value_dtype: A[
        Literal["auto", "int4"],
        Arg(
            help="How values are stored: 'auto' follows --kv-cache-dtype, 'int4' takes 4 bits a channel and a scale "
            "per quarter of them (72 bytes instead of 256 at head_dim 128)."
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
