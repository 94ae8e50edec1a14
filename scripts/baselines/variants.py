"""Variants of the default `Spark` that decide its details: saliency, dense tokens, centring, a prior per channel."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from accuracy.outcomes import Label
from baselines.base import DENSE_CHANNEL_BYTES, Chunk
from baselines.integers import Integers, round_to_integers
from baselines.spark import Spark
from spark_kernels import reference

ALL_QUERIES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class SaliencyVariant(Spark):
    """Another score for what a row keeps.

    Parameters
    ----------
    saliency
        ``magnitude``: the key alone. ``paper``: |k| times the norm, where the default squares k. ``all queries``: the
        norm over the whole chunk.
    """

    saliency: str

    @property
    def label(self) -> Label:
        return Label(f"spark, saliency: {self.saliency}", self.ratio, self.restore_bits, self.value_dtype)

    def scores(self, chunk: Chunk) -> torch.Tensor:
        if self.saliency == "magnitude":
            return chunk.k.abs()
        if self.saliency == "paper":
            return chunk.k.abs() * chunk.query_norms()
        if self.saliency == "all queries":
            q = chunk.q.unflatten(1, (chunk.k.shape[1], -1))
            norms = q.norm(dim=2) if chunk.decoded else q.square().sum((0, 2)).sqrt().expand_as(chunk.k)
            return reference.saliency(chunk.k, norms)
        raise ValueError(f"saliency={self.saliency!r} is not possible: use magnitude, paper or all queries")


@dataclass(frozen=True, kw_only=True)
class DenseTokens(Spark):
    """Sinks or the tokens at the end of each prefill stay whole; they are not counted.

    StreamingLLM (https://arxiv.org/abs/2309.17453) and KIVI (https://arxiv.org/abs/2402.02750) keep such tokens.

    Parameters
    ----------
    sinks
        First tokens of the context that stay whole.
    recent
        Last tokens of a prefill, and all decoded ones, if not 0.
    """

    sinks: int = 0
    recent: int = 0

    @property
    def label(self) -> Label:
        name = f"{self.sinks} dense sinks" if self.sinks else f"{self.recent} dense recent tokens"
        return Label(f"spark, {name}", self.ratio, self.restore_bits, self.value_dtype)

    def keys(self, chunk: Chunk) -> torch.Tensor:
        keys = super().keys(chunk).clone()
        if chunk.position < self.sinks:
            keys[: self.sinks - chunk.position] = chunk.k[: self.sinks - chunk.position]
        if self.recent:
            first = 0 if chunk.decoded else -self.recent
            keys[first:] = chunk.k[first:]
        return keys


@dataclass(frozen=True, kw_only=True)
class DenseLayer(Spark):
    """``--spark-dense-layers`` with some layers of `num_layers`; bytes are the average over layers."""

    num_layers: int

    def key_bytes(self, head_dim: int) -> float:
        dense = len(self.dense_layers) * DENSE_CHANNEL_BYTES * head_dim
        return (dense + (self.num_layers - len(self.dense_layers)) * super().key_bytes(head_dim)) / self.num_layers

    @property
    def label(self) -> Label:
        layers = ",".join(map(str, self.dense_layers))
        return Label(f"spark, dense layer {layers}", self.ratio, self.restore_bits, self.value_dtype)


@dataclass(frozen=True)
class ChannelStatistics:
    """Of calibration keys, float32 ``[num_layers, num_kv_heads, head_dim]``: mean, and deviation from it."""

    mean: torch.Tensor
    deviation: torch.Tensor

    @classmethod
    def of(cls, keys: list[torch.Tensor]) -> ChannelStatistics:
        """From one tensor ``[num_tokens, num_kv_heads, head_dim]`` per layer."""
        mean = torch.stack([k.mean(0) for k in keys])
        return cls(mean, torch.stack([k.std(0) for k in keys]).clamp(min=1e-6))


@dataclass(frozen=True, kw_only=True)
class Calibrated(Spark):
    """Rows of keys less their calibrated mean, and divided by their calibrated deviation if asked for.

    Per-channel statistics as in KVQuant (https://arxiv.org/abs/2401.18079).

    Parameters
    ----------
    statistics
        Of calibration documents.
    prior
        Whether the restore plane has a scale per channel besides its scale per token.
    """

    statistics: ChannelStatistics = field(repr=False)
    prior: bool = False

    @property
    def label(self) -> Label:
        name = "spark, calibrated mean and deviation" if self.prior else "spark, calibrated mean"
        return Label(name, self.ratio, self.restore_bits, self.value_dtype)

    def keys(self, chunk: Chunk) -> torch.Tensor:
        mean = self.statistics.mean[chunk.layer]
        scale = self.statistics.deviation[chunk.layer] if self.prior else torch.ones_like(mean)
        residual = chunk.k - mean
        scores = reference.saliency(residual, chunk.query_norms())
        return self.store_and_read(residual / scale, scores) * scale + mean


@dataclass(frozen=True, kw_only=True)
class CalibratedIntegers(Integers):
    """Plain integers of keys less their calibrated mean, divided by their calibrated deviation.

    Per-channel statistics as in KVQuant (https://arxiv.org/abs/2401.18079).

    Parameters
    ----------
    statistics
        Of calibration documents.
    """

    statistics: ChannelStatistics = field(repr=False)

    @property
    def label(self) -> Label:
        return Label(f"{super().label.method}, calibrated mean and deviation")

    def keys(self, chunk: Chunk) -> torch.Tensor:
        mean, deviation = self.statistics.mean[chunk.layer], self.statistics.deviation[chunk.layer]
        return round_to_integers((chunk.k - mean) / deviation, self.bits, self.group) * deviation + mean
