from __future__ import annotations

from dataclasses import dataclass

import torch

from accuracy.outcomes import Label
from baselines.base import Chunk, Method

SCALE_AND_OFFSET_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Integers(Method):
    """Plain integers per token: groups of channels with a float16 scale and offset each.

    Round-to-nearest asymmetric quantisation as in KIVI (https://arxiv.org/abs/2402.02750) for values; for keys too
    along the channels of one token, so that a token can be read alone.

    Parameters
    ----------
    bits
        Bits per channel.
    group
        Channels that share a scale.
    of_keys, of_values
        What is stored as integers; the other stays bf16.
    """

    bits: int
    group: int
    of_keys: bool = True
    of_values: bool = False

    @property
    def label(self) -> Label:
        parts = " and ".join(name for name, on in (("keys", self.of_keys), ("values", self.of_values)) if on)
        method = f"int{self.bits} {parts}, groups of {self.group}"
        return Label(method, values=f"int{self.bits}" if self.of_values else "bf16")

    def keys(self, chunk: Chunk) -> torch.Tensor:
        return round_to_integers(chunk.k, self.bits, self.group) if self.of_keys else chunk.k

    def values(self, chunk: Chunk) -> torch.Tensor:
        return round_to_integers(chunk.v, self.bits, self.group) if self.of_values else chunk.v

    def key_bytes(self, head_dim: int) -> float:
        return integer_bytes(head_dim, self.bits, self.group) if self.of_keys else super().key_bytes(head_dim)

    def value_bytes(self, head_dim: int) -> float:
        return integer_bytes(head_dim, self.bits, self.group) if self.of_values else super().value_bytes(head_dim)


def round_to_integers(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """`x` ``[..., head_dim]`` as read back from `bits`-bit integers in groups of `group` channels."""
    groups = x.unflatten(-1, (-1, min(group, x.shape[-1])))
    low, high = groups.amin(-1, keepdim=True).half().float(), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-7)
    integers = ((groups - low) / scale).round().clamp(0, 2**bits - 1)
    return (low + scale * integers).flatten(-2)


def integer_bytes(head_dim: int, bits: int, group: int) -> float:
    return head_dim * bits / 8 + head_dim / min(group, head_dim) * SCALE_AND_OFFSET_BYTES
