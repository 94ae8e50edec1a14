"""Kernels for the CPU, compiled by numba.

``vectors`` and ``memory`` are short vectors of float32, ``numbers`` what numba lacks of scalars; ``rows`` restores
rows, ``pack`` makes key rows, ``values`` has int4 values; ``decode`` attends with ``scores`` and ``weighted_sums``,
``extend`` to restored prefixes. The names below are what `spark_kernels.wrappers` needs of an implementation.
"""

from spark_kernels.cpu.decode import DecodePlan, decode_attention
from spark_kernels.cpu.extend import SEGMENT_TOKENS, ExtendPlan, extend_attention, merge_state
from spark_kernels.cpu.pack import write_rows
from spark_kernels.cpu.rows import restore_keys, restore_values

CUDA_GRAPHS = False

__all__ = [
    "CUDA_GRAPHS",
    "SEGMENT_TOKENS",
    "DecodePlan",
    "ExtendPlan",
    "decode_attention",
    "extend_attention",
    "merge_state",
    "restore_keys",
    "restore_values",
    "write_rows",
]
