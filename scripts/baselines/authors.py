from __future__ import annotations

from dataclasses import dataclass

import torch

from accuracy.outcomes import Label
from baselines.base import ChannelPruning, Chunk, bitmap_bytes
from spark_kernels import reference

SMALLEST_NORM = 1e-6


@dataclass(frozen=True, kw_only=True)
class AuthorsRestoration(ChannelPruning):
    """SparK as its authors restore it: the sign, and the root of the mean dropped score over the query norm.

    SparK (https://arxiv.org/abs/2508.15212), the deterministic form of its recovery, as in
    https://github.com/Xnhyacinth/SparK. The query norms belong to the request, not to the token, so they are not
    counted here; a cache shared between requests would have to store them.
    """

    @property
    def label(self) -> Label:
        return Label("SparK authors' restoration", self.ratio)

    def keys(self, chunk: Chunk) -> torch.Tensor:
        norms = chunk.query_norms()
        scores = reference.saliency(chunk.k, norms)
        kept = self.kept(scores)
        mean = scores.where(~kept, 0.0).sum(-1, keepdim=True) / (~kept).sum(-1, keepdim=True).clamp(min=1)
        restored = chunk.k.sign() * (mean / norms.clamp(min=SMALLEST_NORM)).sqrt()
        return chunk.k.where(kept, restored)

    def key_bytes(self, head_dim: int) -> float:
        sign_plane, mean_score = head_dim / 8, 2
        return bitmap_bytes(head_dim, self.ratio) + sign_plane + mean_score
