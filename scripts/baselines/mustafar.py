from __future__ import annotations

from dataclasses import dataclass

import torch

from accuracy.outcomes import Label
from baselines.base import ChannelPruning, Chunk, bitmap_bytes


@dataclass(frozen=True, kw_only=True)
class Mustafar(ChannelPruning):
    """Per-token magnitude pruning of keys, and of values too if asked for, stored as bitmaps.

    Mustafar (https://arxiv.org/abs/2505.22913). Its dense window of recent tokens is left out, so that every token
    takes the bytes that are counted.

    Parameters
    ----------
    prune_values
        Whether values are pruned as keys are.
    """

    prune_values: bool = False

    @property
    def label(self) -> Label:
        return Label("Mustafar", self.ratio, values="pruned" if self.prune_values else "bf16")

    def keys(self, chunk: Chunk) -> torch.Tensor:
        return self._prune(chunk.k)

    def values(self, chunk: Chunk) -> torch.Tensor:
        return self._prune(chunk.v) if self.prune_values else chunk.v

    def _prune(self, x: torch.Tensor) -> torch.Tensor:
        return x.where(self.kept(x.abs()), 0.0)

    def key_bytes(self, head_dim: int) -> float:
        return bitmap_bytes(head_dim, self.ratio)

    def value_bytes(self, head_dim: int) -> float:
        return bitmap_bytes(head_dim, self.ratio) if self.prune_values else super().value_bytes(head_dim)
