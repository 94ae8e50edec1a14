from __future__ import annotations

from dataclasses import dataclass

import torch

from accuracy.outcomes import Label
from baselines.base import Chunk, Method

LIMIT = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, kw_only=True)
class Fp8(Method):
    """8-bit floating point, what ``--kv-cache-dtype fp8_e4m3`` stores without calibrated scales.

    OCP 8-bit floating point (https://arxiv.org/abs/2209.05433).

    Parameters
    ----------
    of_keys, of_values
        What is stored in fp8; the other stays bf16.
    """

    of_keys: bool = True
    of_values: bool = True

    @property
    def label(self) -> Label:
        parts = " and ".join(name for name, on in (("keys", self.of_keys), ("values", self.of_values)) if on)
        return Label(f"fp8 {parts}", values="fp8_e4m3" if self.of_values else "bf16")

    def keys(self, chunk: Chunk) -> torch.Tensor:
        return round_to_fp8(chunk.k) if self.of_keys else chunk.k

    def values(self, chunk: Chunk) -> torch.Tensor:
        return round_to_fp8(chunk.v) if self.of_values else chunk.v

    def key_bytes(self, head_dim: int) -> float:
        return head_dim if self.of_keys else super().key_bytes(head_dim)

    def value_bytes(self, head_dim: int) -> float:
        return head_dim if self.of_values else super().value_bytes(head_dim)


def round_to_fp8(x: torch.Tensor) -> torch.Tensor:
    """`x` as read back from float8_e4m3fn, saturated at 448."""
    return x.clamp(-LIMIT, LIMIT).to(torch.float8_e4m3fn).float()
