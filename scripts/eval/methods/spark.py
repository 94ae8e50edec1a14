from __future__ import annotations

from dataclasses import dataclass

import torch

from eval.methods.base import Chunk, Method
from sglang_spark.calibration import Calibration
from spark_kernels import Numbers, Pruned, reference
from spark_kernels.formats import KeyFormat, ValueFormat


@dataclass(frozen=True)
class Spark(Method):
    """Our rows, as the kernels' reference writes and restores them."""

    recipe: str
    key_format: KeyFormat
    value_format: ValueFormat
    calibration: Calibration

    @property
    def name(self) -> str:
        return f"spark, {self.recipe}"

    def keys(self, chunk: Chunk) -> torch.Tensor:
        if isinstance(self.key_format, Numbers):
            return chunk.k
        restoration = self.calibration.layer(chunk.layer, "cpu").restoration(self.key_format)
        rows = reference.pack_keys(chunk.k, chunk.query_squares(), restoration, self.key_format)
        return reference.unpack_keys(rows, restoration, self.key_format)

    def values(self, chunk: Chunk) -> torch.Tensor:
        return reference.decode_values(reference.encode_values(chunk.v, self.value_format), self.value_format)

    def key_bytes(self, head_dim: int) -> float:
        return self.key_format.row_bytes

    def value_bytes(self, head_dim: int) -> float:
        return self.value_format.row_bytes


def recipes(head_dim: int, calibration: Calibration) -> list[Spark]:
    """The recipes of the README, and their keys and values alone."""
    from sglang_spark.config import DEFAULT_KEY_RATIO, default_restore_bits
    from spark_kernels import Integers

    def keys(bits: float) -> Pruned:
        return Pruned.from_ratio(head_dim, DEFAULT_KEY_RATIO, bits)

    default = default_restore_bits(head_dim)
    whole, int4, int3 = Numbers(head_dim, torch.bfloat16), Integers(head_dim, 4), Integers(head_dim, 3)
    made = [("default", keys(default), int4), ("small", keys(2), int3)]
    if default != 4:
        made.insert(0, ("accurate", keys(4), int4))
    made += [(f"keys of {bits} bits", keys(bits), whole) for bits in (4, 3, 2)]
    made += [("int4 values", whole, int4), ("int3 values", whole, int3)]
    return [Spark(*recipe, calibration) for recipe in made]
