from __future__ import annotations

from dataclasses import dataclass

import torch

from accuracy.outcomes import Label
from baselines.base import ChannelPruning, Chunk, bitmap_bytes
from spark_kernels import reference


@dataclass(frozen=True, kw_only=True)
class ZeroFill(ChannelPruning):
    """Per-token channel pruning without restoration: SparK's saliency, zeros for what is dropped.

    SparK (https://arxiv.org/abs/2508.15212), its ablation without recovery. Stored as a bitmap and 16-bit numbers.
    """

    @property
    def label(self) -> Label:
        return Label("zero-fill", self.ratio)

    def keys(self, chunk: Chunk) -> torch.Tensor:
        scores = reference.saliency(chunk.k, chunk.query_norms())
        return chunk.k.where(self.kept(scores), 0.0)

    def key_bytes(self, head_dim: int) -> float:
        return bitmap_bytes(head_dim, self.ratio)
