"""What compression costs a prefill: writing rows, and attention to a prefix that is restored from rows."""

from __future__ import annotations

import dataclasses

import torch

import spark_kernels as sk
from decode_bench.methods import Batch, Spark
from decode_bench.settings import Heads, Setting
from decode_bench.timing import median_ms

CHUNK = 8192
PREFIXES = (0, 8192, 32768)
# Width of the MLP of Llama-3.1-8B, in hidden sizes.
_MLP_WIDTH = 3.5


def measure(
    heads: Heads, settings: list[Setting], device: torch.device, missing: dict[str, str], seconds: float
) -> list[dict]:
    """Times of one layer for a chunk of `CHUNK` tokens of one request, a row per prefix and setting.

    Of rows: ``write_ms`` and ``extend_ms``. Of the dense cache: ``store_ms``, its keys and values copied to their
    slots, and ``dense_ms``, FlashInfer's attention of the chunk to prefix and chunk in one piece; None where
    ``missing`` has FlashInfer. ``linear_ms``: the layer's matrix products, whatever the cache. ``overhead`` is what
    rows add to the sum of the dense layer's three.
    """
    linear_ms = _linear_ms(heads, device, seconds)
    rows = []
    for prefix in PREFIXES:
        chunk = Batch([CHUNK], heads, device, torch.bfloat16)
        q, k, v = (chunk.random(CHUNK, n) for n in (heads.num_qo_heads, heads.num_kv_heads, heads.num_kv_heads))
        store_ms = _store_ms(chunk, k, v, seconds)
        dense_ms = None if "flashinfer_bf16" in missing else _dense_ms(chunk, prefix, q, seconds)
        for setting in settings:
            write_ms, extend_ms = _spark_ms(chunk, prefix, setting, (q, k, v), seconds)
            overhead = None
            if dense_ms is not None:
                overhead = (write_ms + extend_ms - store_ms - dense_ms) / (linear_ms + store_ms + dense_ms)
            rows.append(
                {
                    "chunk": CHUNK,
                    "prefix": prefix,
                    "setting": str(setting),
                    "write_ms": write_ms,
                    "extend_ms": extend_ms,
                    "store_ms": store_ms,
                    "dense_ms": dense_ms,
                    "linear_ms": linear_ms,
                    "overhead": overhead,
                    "missing": {} if dense_ms else {"flashinfer_bf16": missing["flashinfer_bf16"]},
                }
            )
    return rows


def _spark_ms(
    chunk: Batch, prefix: int, setting: Setting, tokens: tuple[torch.Tensor, ...], seconds: float
) -> tuple[float, float]:
    heads, device = chunk.heads, chunk.device
    rows = setting.rows(chunk.num_slots, heads, device)
    indptr = torch.tensor([0, CHUNK], dtype=torch.int32, device=device)
    writer = sk.SparkBatchWriteWrapper(device)
    writer.plan(chunk.kv_indices, indptr)
    write_ms = median_ms(lambda: writer.run(*tokens, rows), seconds)

    cached = Batch([prefix], heads, device, torch.bfloat16)
    prefix_rows = Spark(cached, setting).layers[0] if prefix else rows
    wrapper = sk.SparkBatchPrefillWrapper(device)
    wrapper.plan(indptr, cached.kv_indptr, cached.kv_indices, *dataclasses.astuple(heads))
    extend_ms = median_ms(lambda: wrapper.run(*tokens, prefix_rows, sm_scale=heads.sm_scale), seconds)
    return write_ms, extend_ms


def _store_ms(chunk: Batch, k: torch.Tensor, v: torch.Tensor, seconds: float) -> float:
    k_cache, v_cache = (torch.zeros(chunk.num_slots, *k.shape[1:], dtype=k.dtype, device=k.device) for _ in range(2))
    slots = chunk.kv_indices.long()

    def store() -> None:
        k_cache.index_copy_(0, slots, k)
        v_cache.index_copy_(0, slots, v)

    return median_ms(store, seconds)


def _dense_ms(chunk: Batch, prefix: int, q: torch.Tensor, seconds: float) -> float:
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    heads = chunk.heads
    k, v = (chunk.random(prefix + CHUNK, heads.num_kv_heads) for _ in range(2))
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(
        torch.zeros(384 << 20, dtype=torch.uint8, device=chunk.device), "NHD"
    )
    # Causal masks are aligned to the end: the chunk's tokens see all of the prefix.
    wrapper.plan(
        torch.tensor([0, CHUNK], dtype=torch.int32),
        torch.tensor([0, prefix + CHUNK], dtype=torch.int32),
        *dataclasses.astuple(heads),
        causal=True,
        sm_scale=heads.sm_scale,
        q_data_type=q.dtype,
    )
    return median_ms(lambda: wrapper.run(q, k, v), seconds)


def _linear_ms(heads: Heads, device: torch.device, seconds: float) -> float:
    hidden = heads.num_qo_heads * heads.head_dim
    mlp = int(_MLP_WIDTH * hidden)
    qkv = hidden + 2 * heads.num_kv_heads * heads.head_dim
    sizes = ((hidden, qkv), (hidden, hidden), (hidden, 2 * mlp), (mlp, hidden))
    inputs = {n: torch.randn(CHUNK, n, dtype=torch.bfloat16, device=device) for n in {n for n, _ in sizes}}
    weights = [torch.randn(n, m, dtype=torch.bfloat16, device=device) for n, m in sizes]

    def layer() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[0]], weight)

    return median_ms(layer, seconds)
