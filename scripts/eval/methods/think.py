from __future__ import annotations

from dataclasses import dataclass

import torch

from eval.methods.base import DENSE_CHANNEL_BYTES, WINDOW, Chunk, Method, kept_count, kept_mask


@dataclass(frozen=True)
class ThinK(Method):
    """Structured pruning: one set of key channels per head for all tokens of a prefill.

    ThinK (https://arxiv.org/abs/2407.21018): channel j scores ``|Q_j K_j^T|_F`` over the observation window. As in
    the paper the last 32 tokens and decoded tokens stay whole; they are not counted.
    """

    ratio: float

    @property
    def name(self) -> str:
        return f"ThinK {self.ratio:g}"

    def keys(self, chunk: Chunk) -> torch.Tensor:
        if chunk.decoded:
            return chunk.k
        kept = kept_mask(chunk.query_squares()[-1].sqrt() * chunk.k.norm(dim=0), self.ratio)
        return torch.cat([chunk.k[:-WINDOW].where(kept, 0.0), chunk.k[-WINDOW:]])

    def key_bytes(self, head_dim: int) -> float:
        return DENSE_CHANNEL_BYTES * kept_count(head_dim, self.ratio)
