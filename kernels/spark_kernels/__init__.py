"""KV-cache compression by channel pruning (SparK, arXiv 2508.15212): formats, reference and kernels."""

from spark_kernels.calibration import KeyCalibration
from spark_kernels.formats import Integers, Numbers, Pruned, legal_key_ratios
from spark_kernels.rows import LayerRows
from spark_kernels.wrappers import SparkBatchDecodeWrapper, SparkBatchPrefillWrapper, merge_state
from spark_kernels.write import SparkBatchWriteWrapper, restore_keys, restore_values, write_rows

__all__ = [
    "Integers",
    "KeyCalibration",
    "LayerRows",
    "Numbers",
    "Pruned",
    "SparkBatchDecodeWrapper",
    "SparkBatchPrefillWrapper",
    "SparkBatchWriteWrapper",
    "legal_key_ratios",
    "merge_state",
    "restore_keys",
    "restore_values",
    "write_rows",
]
