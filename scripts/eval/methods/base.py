"""What a method is: how keys and values look after they were stored and read back, and what storing them takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spark_kernels import reference

WINDOW = 32
DENSE_CHANNEL_BYTES = 2


@dataclass(frozen=True)
class Chunk:
    """The tokens that one layer is given to store.

    Parameters
    ----------
    q
        float32 ``[num_tokens, num_qo_heads, head_dim]``, rotated.
    k, v
        float32 ``[num_tokens, num_kv_heads, head_dim]``, already rounded to bf16; keys rotated.
    layer
        Which layer.
    position
        Tokens before the chunk.
    decoded
        Whether each token came from a decode step of its own, so that its own query is all there is.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layer: int = 0
    position: int = 0
    decoded: bool = False

    def query_squares(self, window: int = WINDOW) -> torch.Tensor:
        """Squares of query channels over each token's observation window, ``[num_tokens, num_kv_heads, head_dim]``."""
        bounds = None if self.decoded else torch.tensor([0, len(self.q)])
        return reference.query_squares(self.q, self.k.shape[1], qo_indptr=bounds, window=window)

    def group_queries(self, window: int) -> torch.Tensor:
        """The last `window` queries by KV head, ``[num_kv_heads, window * group, head_dim]``."""
        q = self.q[-window:].unflatten(1, (self.k.shape[1], -1))
        return q.permute(1, 0, 2, 3).flatten(1, 2)


class Method:
    """One way of storing a cache: this one in bf16. A subclass changes keys, values, or which tokens stay.

    Methods see real numbers and return real numbers; what they would store is only counted, in bytes per token and
    KV head.
    """

    name = "dense bf16"

    def keys(self, chunk: Chunk) -> torch.Tensor:
        """Keys as attention reads them, shaped like ``chunk.k``."""
        return chunk.k

    def values(self, chunk: Chunk) -> torch.Tensor:
        """Values as attention reads them, shaped like ``chunk.v``."""
        return chunk.v

    def kept_tokens(self, chunk: Chunk, keys: torch.Tensor) -> torch.Tensor | None:
        """Of all cached `keys` ``[num_kv_heads, n, head_dim]``, the chunk's last, the indices of those that stay.

        ``[num_kv_heads, m]`` in ascending order, or None for all of them.
        """
        return None

    def key_bytes(self, head_dim: int) -> float:
        return DENSE_CHANNEL_BYTES * head_dim

    def value_bytes(self, head_dim: int) -> float:
        return DENSE_CHANNEL_BYTES * head_dim


def kept_mask(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """True at the channels with the best ``scores`` ``[..., head_dim]`` that a pruning ratio leaves."""
    channels = scores.topk(kept_count(scores.shape[-1], ratio), dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, channels, True)


def kept_count(head_dim: int, ratio: float) -> int:
    """Channels that a pruning ratio leaves, as in the authors' code."""
    return head_dim - int(ratio * head_dim)
