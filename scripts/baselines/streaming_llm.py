from __future__ import annotations

from dataclasses import dataclass

import torch

from accuracy.outcomes import Label
from baselines.base import Chunk, TokenEviction

SINKS = 4


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(TokenEviction):
    """Keeps the first tokens and the most recent ones.

    StreamingLLM (https://arxiv.org/abs/2309.17453), with 4 sinks and a window that is a share of the context, so
    that its bytes can be equal to another method's. Positions are not shifted.
    """

    @property
    def label(self) -> Label:
        return Label(f"StreamingLLM, {self.share:.0%} of tokens")

    def kept_tokens(self, chunk: Chunk, keys: torch.Tensor) -> torch.Tensor | None:
        if chunk.decoded:
            return None
        num_kv_heads, present, _ = keys.shape
        recent = max(1, round(self.share * (chunk.position + len(chunk.k))) - SINKS)
        if present <= recent + SINKS:
            return None
        kept = torch.cat([torch.arange(SINKS), torch.arange(present - recent, present)])
        return kept.expand(num_kv_heads, -1)
