from __future__ import annotations

from dataclasses import dataclass

import torch

from accuracy.outcomes import Label
from baselines.base import DENSE_CHANNEL_BYTES, WINDOW, ChannelPruning, Chunk, kept_count


@dataclass(frozen=True, kw_only=True)
class ThinK(ChannelPruning):
    """Structured pruning: one set of key channels per head for all tokens of a prefill.

    ThinK (https://arxiv.org/abs/2407.21018): channel j scores ``|Q_j K_j^T|_F`` over the observation window. As in
    the paper the last 32 tokens and decoded tokens stay whole; they are not counted.
    """

    @property
    def label(self) -> Label:
        return Label("ThinK", self.ratio)

    def keys(self, chunk: Chunk) -> torch.Tensor:
        if chunk.decoded:
            return chunk.k
        scores = chunk.query_norms()[-1] * chunk.k.norm(dim=0)
        kept = self.kept(scores)
        return torch.cat([chunk.k[:-WINDOW].where(kept, 0.0), chunk.k[-WINDOW:]])

    def key_bytes(self, head_dim: int) -> float:
        return DENSE_CHANNEL_BYTES * kept_count(head_dim, self.ratio)
