"""Kernels for NVIDIA GPUs, written in Triton.

``decode`` attends to rows: ``plan`` splits a batch, ``queries``
prepares what ``scores`` looks up, ``merge`` combines the splits. The names below are those of `spark_kernels.cpu`,
writing, restoring and attention of extend are missing.
"""

from spark_kernels.gpu.decode import decode_attention
from spark_kernels.gpu.merge import merge_state
from spark_kernels.gpu.plan import DecodePlan

__all__ = [
    "DecodePlan",
    "decode_attention",
    "merge_state",
]
