from __future__ import annotations

from dataclasses import dataclass

import torch

from eval.methods.base import DENSE_CHANNEL_BYTES, Chunk, Method, kept_count, kept_mask

SMALLEST_NORM = 1e-6


@dataclass(frozen=True)
class Authors(Method):
    """SparK as its authors restore it: the sign, and the root of the mean dropped score over the query norm.

    SparK (https://arxiv.org/abs/2508.15212), the deterministic form of its recovery, as in
    https://github.com/Xnhyacinth/SparK. The query norms belong to the request, not to the token, so they are not
    counted here; a cache shared between requests would have to store them.
    """

    ratio: float

    @property
    def name(self) -> str:
        return f"SparK's authors {self.ratio:g}"

    def keys(self, chunk: Chunk) -> torch.Tensor:
        norms = chunk.query_squares().sqrt()
        scores = chunk.k.square() * norms
        kept = kept_mask(scores, self.ratio)
        mean = scores.where(~kept, 0.0).sum(-1, keepdim=True) / (~kept).sum(-1, keepdim=True).clamp(min=1)
        restored = chunk.k.sign() * (mean / norms.clamp(min=SMALLEST_NORM)).sqrt()
        return chunk.k.where(kept, restored)

    def key_bytes(self, head_dim: int) -> float:
        kept_bitmap, sign_plane, mean_score = head_dim / 8, head_dim / 8, 2
        return kept_bitmap + sign_plane + mean_score + DENSE_CHANNEL_BYTES * kept_count(head_dim, self.ratio)
