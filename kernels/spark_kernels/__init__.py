"""KV-cache compression by channel pruning (SparK, arXiv 2508.15212): formats, reference and kernels."""

from spark_kernels.record import (
    CompressedKeyFormat,
    Int4ValueFormat,
    KeyFormat,
    LayerRows,
    RawKeyFormat,
    ValueFormat,
    legal_key_ratios,
)
from spark_kernels.wrappers import (
    SparkBatchDecodeWrapper,
    SparkBatchPrefillWrapper,
    merge_state,
    restore_keys,
    restore_values,
    write_rows,
)

__all__ = [
    "CompressedKeyFormat",
    "Int4ValueFormat",
    "KeyFormat",
    "LayerRows",
    "RawKeyFormat",
    "SparkBatchDecodeWrapper",
    "SparkBatchPrefillWrapper",
    "ValueFormat",
    "legal_key_ratios",
    "merge_state",
    "restore_keys",
    "restore_values",
    "write_rows",
]
