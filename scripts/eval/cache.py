"""Caches that a transformers model attends to, in which a method's stored keys and values stand for the real ones.

It does what the server does: a prefill chunk attends to itself exactly and to earlier tokens as stored; a decoded
token is stored first and then attends to stored tokens only, itself among them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eval.methods.base import Chunk, Method

ATTENTION = "simulated_cache"
# Tokens of follow-up turns that fit without another copy.
GROWTH = 256


class SimulatedCache:
    """Keys and values of one sequence, per layer and KV head.

    Parameters
    ----------
    method
        What stored keys and values look like.
    num_layers
        Layers of the model.
    """

    def __init__(self, method: Method, num_layers: int):
        self.method = method
        self.tokens = 0
        self.decoding = False
        self.last_chunks: list[Chunk] = []
        self._layers = [LayerStore() for _ in range(num_layers)]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """Stores a layer's chunk; q, k, v and the result are ``[num_heads, num_tokens, head_dim]``."""
        k, v = k.bfloat16().float(), v.bfloat16().float()
        by_token = (x.transpose(0, 1) for x in (q, k, v))
        chunk = Chunk(*by_token, layer, self.tokens, self.decoding)
        self.last_chunks.append(chunk)
        store = self._layers[layer]
        if self.decoding:
            self.store(chunk)
            return causal_attention(q, store.keys, store.values, scaling)
        exact = (k, v) if store.tokens == 0 else (torch.cat([store.keys, k], 1), torch.cat([store.values, v], 1))
        out = causal_attention(q, *exact, scaling)
        self.store(chunk)
        return out

    def store(self, chunk: Chunk) -> None:
        """Adds a chunk's tokens to its layer as the method stores them, and drops the tokens it evicts."""
        store = self._layers[chunk.layer]
        store.append(*(x.transpose(0, 1) for x in (self.method.keys(chunk), self.method.values(chunk))))
        kept = self.method.kept_tokens(chunk, store.keys)
        if kept is not None:
            store.keep(kept)

    def start_from(self, chunks: list[Chunk]) -> None:
        """Stores an exact prefill's chunks, one per layer, in the place of running it again."""
        for chunk in chunks:
            self.store(chunk)
        self.tokens = len(chunks[0].k)


class LayerStore:
    """Keys and values ``[num_kv_heads, tokens, head_dim]`` of one layer, in buffers with room to grow."""

    def __init__(self) -> None:
        self.tokens = 0
        self._buffers: list[torch.Tensor] = []

    @property
    def keys(self) -> torch.Tensor:
        return self._buffers[0][:, : self.tokens]

    @property
    def values(self) -> torch.Tensor:
        return self._buffers[1][:, : self.tokens]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        end = self.tokens + keys.shape[1]
        if not self._buffers or end > self._buffers[0].shape[1]:
            grown = [x.new_empty(x.shape[0], end + GROWTH, x.shape[2]) for x in (keys, values)]
            for new, old in zip(grown, self._buffers, strict=False):
                new[:, : self.tokens] = old[:, : self.tokens]
            self._buffers = grown
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[:, self.tokens : end] = new
        self.tokens = end

    def keep(self, tokens: torch.Tensor) -> None:
        """Drops all tokens but these, ``[num_kv_heads, m]``."""
        for buffer in self._buffers:
            index = tokens[..., None].expand(-1, -1, buffer.shape[2])
            buffer[:, : tokens.shape[1]] = buffer.gather(1, index)
        self.tokens = tokens.shape[1]


def causal_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Queries of the last tokens over all tokens up to each; ``[num_heads, num_tokens, head_dim]`` throughout."""
    num_heads, n, head_dim = q.shape
    m = keys.shape[1]
    if n == m:
        return F.scaled_dot_product_attention(q[None], keys[None], values[None], is_causal=True, scale=scaling,
                                              enable_gqa=True)[0]  # fmt: skip
    # A few queries over many keys: a product per KV head is several times as fast as the masked SDPA.
    grouped = q.reshape(keys.shape[0], -1, head_dim)
    logits = (grouped @ keys.transpose(1, 2) * scaling).view(num_heads, n, m)
    logits = logits.masked_fill(~torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n), -torch.inf)
    return (logits.softmax(-1).view(keys.shape[0], -1, m) @ values).view(num_heads, n, -1)


def load_model(path: str) -> PreTrainedModel:
    """The model in float32, attending through `SimulatedCache`."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=ATTENTION).eval()


@torch.inference_mode()
def forward(
    model: PreTrainedModel,
    caches: list[SimulatedCache],
    ids: list[int],
    *,
    decoding: bool,
    logits_to_keep: int = 0,
    offset: int = 0,
) -> torch.Tensor:
    """Log-probabilities ``[caches, tokens, vocabulary]`` after each of the last `logits_to_keep` tokens (0: all).

    All caches have seen the same tokens and now see `ids`, at positions ``offset`` further on. With `decoding` every
    token is a decode step of its own, all of them computed at once.
    """
    for cache in caches:
        cache.decoding = decoding
        cache.last_chunks = []
    seen = caches[0].tokens + offset
    logits = model(
        torch.tensor([ids]).expand(len(caches), -1),
        position_ids=torch.arange(seen, seen + len(ids))[None],
        use_cache=False,
        simulated_caches=caches,
        logits_to_keep=logits_to_keep,
    ).logits
    for cache in caches:
        cache.tokens += len(ids)
    return logits.float().log_softmax(-1)


def _attention(module, query, key, value, attention_mask, scaling, simulated_caches, **kwargs):
    states = zip(simulated_caches, query, key, value, strict=True)
    out = torch.stack([cache.attend(module.layer_idx, q, k, v, scaling) for cache, q, k, v in states])
    return out.transpose(1, 2), None
