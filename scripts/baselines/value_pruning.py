from __future__ import annotations

from dataclasses import dataclass

import torch

from accuracy.outcomes import Label
from baselines.base import ChannelPruning, Chunk, bitmap_bytes
from spark_kernels import reference
from spark_kernels.formats import CompressedKeyFormat, KeyFormat


@dataclass(frozen=True, kw_only=True)
class ValuePruning(ChannelPruning):
    """Channel pruning of values, keys whole: SparK's ablation.

    SparK (https://arxiv.org/abs/2508.15212) scores ``0.7 |v| + 0.3 variance``; here both are divided by their mean
    over channels first, and the variance of a channel is over the chunk's tokens (decoded tokens: magnitude alone).

    Parameters
    ----------
    with_variance
        The paper's score instead of the magnitude.
    restore_bits
        0 leaves zeros, in a bitmap and 16-bit numbers; 1 and 2 store SparK's key rows with values in them.
    """

    with_variance: bool = False
    restore_bits: int = 0

    @property
    def label(self) -> Label:
        score = "magnitude and variance" if self.with_variance else "magnitude"
        restored = f"restored from {self.restore_bits} bits" if self.restore_bits else "zero-filled"
        return Label(f"values pruned by {score}, {restored}", values=f"pruned {self.ratio:g}")

    def values(self, chunk: Chunk) -> torch.Tensor:
        scores = chunk.v.abs()
        if self.with_variance and not chunk.decoded:
            variance = chunk.v.var(dim=0)
            scores = 0.7 * scores / scores.mean(-1, keepdim=True) + 0.3 * variance / variance.mean(-1, keepdim=True)
        head_dim = chunk.v.shape[-1]
        if not self.restore_bits:
            return chunk.v.where(self.kept(scores), 0.0)
        row = self._row(head_dim)
        channels = reference.select_channels(scores, row.kept_channels)
        return reference.unpack_keys(reference.pack_keys(chunk.v, channels, row), row)

    def _row(self, head_dim: int) -> CompressedKeyFormat:
        return KeyFormat.from_ratio(head_dim, self.ratio, self.restore_bits)

    def value_bytes(self, head_dim: int) -> float:
        return self._row(head_dim).row_bytes if self.restore_bits else bitmap_bytes(head_dim, self.ratio)
