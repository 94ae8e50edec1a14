"""Errors of the same methods on synthetic keys with what large models are known for, so that conclusions do not hang
on one small model.

Key statistics follow KIVI (https://arxiv.org/abs/2402.02750, figure 2), KVQuant (https://arxiv.org/abs/2401.18079,
section 3) and Massive Activations (https://arxiv.org/abs/2402.17762): a few channels per head are tens of times
larger than the median, with an offset of their own that is nearly constant over tokens before the rotary embedding,
which then mixes them with their partner channels; distributions have heavy tails. Queries are small where keys are
large, and attention is moderately peaked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from baselines.base import WINDOW, Chunk, Method
from spark_kernels import reference

TOKENS = 1024
NUM_KV_HEADS = 2
GROUP = 4
LOGIT_DEVIATION = 2.5
OUTLIER_SHARE = 1 / 32
LARGEST_OUTLIER = 60.0
ROPE_THETA = 500_000.0


@dataclass(frozen=True)
class KeyModel:
    """How synthetic keys are drawn.

    Parameters
    ----------
    name
        What the report calls it.
    outliers
        Whether a few channels are up to 60 times the median, mostly by a constant offset.
    tails
        Degrees of freedom of Student's t, infinite for Gaussian keys.
    rotary
        Whether keys and queries are rotated by their positions.
    """

    name: str
    outliers: bool = False
    tails: float = math.inf
    rotary: bool = False

    def draw(self, head_dim: int, seed: int) -> tuple[Chunk, torch.Tensor]:
        """A prefill of `TOKENS` tokens and later queries ``[WINDOW, num_qo_heads, head_dim]``."""
        generator = torch.Generator().manual_seed(seed)
        k = self._noise((TOKENS, NUM_KV_HEADS, head_dim), generator)
        v = torch.randn(k.shape, generator=generator)
        q = torch.randn(TOKENS + WINDOW, NUM_KV_HEADS * GROUP, head_dim, generator=generator)
        # A common direction makes the window's queries say something about later ones.
        q += torch.randn(q.shape[1:], generator=generator)
        if self.outliers:
            size = self._outlier_sizes(head_dim, generator)
            sign = torch.randint(0, 2, size.shape, generator=generator) * 2.0 - 1.0
            # Three quarters of an outlier is offset, the rest varies by token.
            k = k * (1 + (size - 1) / 4) + sign * (size - 1) * 3 / 4
            q = q / size.repeat_interleave(GROUP, 0).sqrt()
        if self.rotary:
            k, q = rotate(k), rotate(q)
        logits = torch.einsum("nhgd,mhd->hgnm", q[-WINDOW:].unflatten(1, (NUM_KV_HEADS, GROUP)), k)
        q *= LOGIT_DEVIATION * math.sqrt(head_dim) / logits.std(-1).mean()
        k, v = k.bfloat16().float(), v.bfloat16().float()
        return Chunk(q[:TOKENS], k, v), q[TOKENS:]

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if math.isinf(self.tails):
            return noise
        # Student's t: a normal over the root of a chi-square, which is a sum of squares.
        squares = torch.randn(*shape, int(self.tails), generator=generator).square().mean(-1)
        return noise / squares.sqrt()

    def _outlier_sizes(self, head_dim: int, generator: torch.Generator) -> torch.Tensor:
        size = torch.ones(NUM_KV_HEADS, head_dim)
        count = max(2, round(OUTLIER_SHARE * head_dim))
        for head in range(NUM_KV_HEADS):
            channels = torch.randperm(head_dim, generator=generator)[:count]
            size[head, channels] = torch.logspace(math.log10(10), math.log10(LARGEST_OUTLIER), count)
        return size


KEY_MODELS = (
    KeyModel("gaussian"),
    KeyModel("heavy tails", tails=4),
    KeyModel("outlier channels", outliers=True),
    KeyModel("outlier channels, heavy tails, rotary", outliers=True, tails=4, rotary=True),
)


@dataclass(frozen=True)
class Errors:
    """Root mean square error of logits over their standard deviation, and of outputs over their norm."""

    logits: float
    output: float


def errors(method: Method, chunk: Chunk, queries: torch.Tensor) -> Errors:
    """Of attention of later queries over what `method` stores of a chunk's keys; values are exact."""
    sm_scale = chunk.k.shape[-1] ** -0.5
    stored = method.keys(chunk)
    grouped = queries.unflatten(1, (chunk.k.shape[1], -1))
    dense_logits, logits = (torch.einsum("nhgd,mhd->hgnm", grouped, k) * sm_scale for k in (chunk.k, stored))
    # Adding a constant to a query's logits changes nothing.
    difference = logits - dense_logits
    difference = difference - difference.mean(-1, keepdim=True)
    out, _ = reference.dense_attention(queries, stored, chunk.v, sm_scale=sm_scale)
    dense, _ = reference.dense_attention(queries, chunk.k, chunk.v, sm_scale=sm_scale)
    return Errors(
        float(difference.square().mean().sqrt() / dense_logits.std(-1).mean()),
        float((out - dense).norm() / dense.norm()),
    )


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``[tokens, heads, head_dim]`` at positions 0 .. tokens - 1, Llama's pairs."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] * ROPE_THETA ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    low, high = x[..., :half], x[..., half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
