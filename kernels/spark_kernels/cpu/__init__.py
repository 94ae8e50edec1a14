"""Kernels for the CPU, compiled by numba.

``write`` makes rows, ``restore`` reads them back, ``decode`` attends to them with ``scores`` and ``weighted_sums``,
``extend`` attends to new chunks and restored prefixes. ``fields`` is what they know of a format, ``hadamard`` the
transform of values; ``vectors`` and ``memory`` are short vectors of float32, ``numbers`` what numba lacks of scalars.
The names below are those of `spark_kernels.implementation.Kernels`.
"""

from spark_kernels.cpu.decode import DecodePlan, decode_attention
from spark_kernels.cpu.extend import SEGMENT_TOKENS, ExtendPlan, extend_attention, merge_state
from spark_kernels.cpu.restore import restore_keys, restore_values
from spark_kernels.cpu.slots import fill_slots
from spark_kernels.cpu.write import write_rows

CUDA_GRAPHS = False

__all__ = [
    "CUDA_GRAPHS",
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
