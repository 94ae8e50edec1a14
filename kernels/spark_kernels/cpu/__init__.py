"""Kernels for the CPU, compiled by numba.

``numbers`` converts 8- and 16-bit numbers, ``rows`` restores rows, ``pack`` makes key rows, ``values`` has int4 values,
``decode`` and ``extend`` are attention. The names below are what `spark_kernels.wrappers` needs of an implementation.
"""

from spark_kernels.cpu.decode import DecodePlan, decode_attention
from spark_kernels.cpu.extend import ExtendPlan, extend_attention, merge_state
from spark_kernels.cpu.pack import write_rows
from spark_kernels.cpu.rows import restore_keys, restore_values

__all__ = [
    "DecodePlan",
    "ExtendPlan",
    "decode_attention",
    "extend_attention",
    "merge_state",
    "restore_keys",
    "restore_values",
    "write_rows",
]
