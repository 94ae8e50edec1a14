"""Kernels for NVIDIA GPUs, written in Triton.

``write`` makes rows, ``restore`` reads them back, ``decode`` attends to them: ``plan`` splits a batch, ``queries``
prepares what ``scores`` looks up, ``merge`` combines the splits. The names below are those of `spark_kernels.cpu`,
except that attention of extend is missing.
"""

from spark_kernels.gpu.decode import decode_attention
from spark_kernels.gpu.merge import merge_state
from spark_kernels.gpu.plan import DecodePlan
from spark_kernels.gpu.restore import restore_keys, restore_values
from spark_kernels.gpu.write import write_rows

__all__ = [
    "DecodePlan",
    "decode_attention",
    "merge_state",
    "restore_keys",
    "restore_values",
    "write_rows",
]
