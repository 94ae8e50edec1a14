"""The Hadamard transform of value rows, as `spark_kernels.reference.hadamard` defines it, sum for sum."""

from __future__ import annotations

from spark_kernels.cpu import memory, vectors
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.vector_types import LANES


@kernel()
def transform(tile, row, block):
    """Replace ``tile[row]``, float32, by its transform in blocks of ``block`` channels, at least 16."""
    for j in range(0, tile.shape[1], LANES):
        x = memory.load(tile, row, j)
        x = vectors.butterfly(x, 1)
        x = vectors.butterfly(x, 2)
        x = vectors.butterfly(x, 4)
        memory.store(tile, row, j, vectors.butterfly(x, 8))
    width = LANES
    while width < block:
        for start in range(0, tile.shape[1], 2 * width):
            for j in range(start, start + width, LANES):
                a, b = memory.load(tile, row, j), memory.load(tile, row, j + width)
                memory.store(tile, row, j, vectors.add(a, b))
                memory.store(tile, row, j + width, vectors.subtract(a, b))
        width *= 2
