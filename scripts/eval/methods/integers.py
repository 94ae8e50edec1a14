from __future__ import annotations

from dataclasses import dataclass

import torch

from eval.methods.base import Chunk, Method
from spark_kernels.reference import hadamard

SCALE_AND_OFFSET_BYTES = 4


@dataclass(frozen=True)
class Integers(Method):
    """Integers per token: groups of channels with a float16 scale and offset each.

    Round-to-nearest asymmetric quantisation as KIVI's of values (https://arxiv.org/abs/2402.02750); of keys too along
    the channels of one token, so that a token can be read alone. ``rotated``: after a Hadamard transform over the
    channels, as QuaRot (https://arxiv.org/abs/2404.00456) and TurboQuant-like formats do.

    Parameters
    ----------
    bits
        Bits per channel.
    group
        Channels that share a scale; at most head_dim.
    """

    bits: int
    group: int
    rotated: bool = False

    @property
    def name(self) -> str:
        groups = "one scale" if self.group >= 256 else f"groups of {self.group}"
        return f"{'Hadamard ' if self.rotated else ''}int{self.bits}, {groups}"

    def _stored(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rotated:
            return _rounded(x, self.bits, self.group)
        block = x.shape[-1]
        return hadamard(_rounded(hadamard(x, block) / block**0.5, self.bits, self.group), block) / block**0.5

    def keys(self, chunk: Chunk) -> torch.Tensor:
        return self._stored(chunk.k)

    def values(self, chunk: Chunk) -> torch.Tensor:
        return self._stored(chunk.v)

    def key_bytes(self, head_dim: int) -> float:
        return head_dim * self.bits / 8 + head_dim / min(self.group, head_dim) * SCALE_AND_OFFSET_BYTES

    value_bytes = key_bytes


def _rounded(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    groups = x.unflatten(-1, (-1, min(group, x.shape[-1])))
    low, high = groups.amin(-1, keepdim=True).half().float(), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-7)
    integers = ((groups - low) / scale).round().clamp(0, 2**bits - 1)
    return (low + scale * integers).flatten(-2)
