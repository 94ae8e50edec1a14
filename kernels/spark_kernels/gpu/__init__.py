"""Kernels for NVIDIA GPUs, written in Triton.

``write`` makes rows, ``restore`` reads them back, ``decode`` attends to them: ``plan`` splits a batch, ``queries``
prepares queries for what ``unpack`` reads, ``merge`` combines the splits. ``extend`` attends to new chunks and restored
prefixes by ``dense`` attention. The names below are those of `spark_kernels.implementation.Kernels`.
"""

from spark_kernels.gpu.decode import MAX_GROUP, decode_attention
from spark_kernels.gpu.extend import SEGMENT_TOKENS, ExtendPlan, extend_attention
from spark_kernels.gpu.merge import merge_state
from spark_kernels.gpu.plan import DecodePlan
from spark_kernels.gpu.restore import restore_keys, restore_values
from spark_kernels.gpu.rows import HEAD_DIMS
from spark_kernels.gpu.slots import fill_slots
from spark_kernels.gpu.write import write_rows

CUDA_GRAPHS = True

__all__ = [
    "CUDA_GRAPHS",
    "HEAD_DIMS",
    "MAX_GROUP",
    "SEGMENT_TOKENS",
    "DecodePlan",
    "ExtendPlan",
    "decode_attention",
    "extend_attention",
    "fill_slots",
    "merge_state",
    "restore_keys",
    "restore_values",
    "write_rows",
]
