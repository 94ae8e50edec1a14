from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from eval.methods.base import WINDOW, Chunk, Method

POOLING = 5


@dataclass(frozen=True)
class SnapKV(Method):
    """Keeps the tokens that the last 32 queries attend to most, by KV head.

    SnapKV (https://arxiv.org/abs/2404.14469): attention of the observation window summed over queries, averaged over
    5 neighbours; the window itself stays.

    Parameters
    ----------
    share
        Of the tokens so far, how many stay after each prefill.
    """

    share: float

    @property
    def name(self) -> str:
        return f"SnapKV, {self.share:.0%} of tokens"

    def key_bytes(self, head_dim: int) -> float:
        return self.share * super().key_bytes(head_dim)

    def value_bytes(self, head_dim: int) -> float:
        return self.share * super().value_bytes(head_dim)

    def kept_tokens(self, chunk: Chunk, keys: torch.Tensor) -> torch.Tensor | None:
        if chunk.decoded:
            return None
        num_kv_heads, present, head_dim = keys.shape
        count = round(self.share * (chunk.position + len(chunk.k)))
        window = min(WINDOW, len(chunk.q), count)
        if present <= count:
            return None
        logits = chunk.group_queries(window) @ keys[:, : present - window].transpose(1, 2) / head_dim**0.5
        votes = F.avg_pool1d(logits.softmax(-1).sum(1)[:, None], POOLING, stride=1, padding=POOLING // 2)[:, 0]
        chosen = votes.topk(count - window, dim=-1).indices.sort(dim=-1).values
        recent = torch.arange(present - window, present).expand(num_kv_heads, -1)
        return torch.cat([chosen, recent], dim=-1)
