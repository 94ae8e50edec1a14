"""The ways to compute decode attention that are compared: rows, and the dense kernels a server would use.

Each is made for a `Batch` with one or more copies of a layer's cache, and runs over one of them; made so that it can be
captured in a CUDA graph, as a server runs it. A dense kernel that cannot be imported raises ImportError when it is
made.
"""

from __future__ import annotations

import dataclasses
from itertools import accumulate

import torch

import spark_kernels as sk
from decode_bench.settings import Heads, Setting

# Tokens of random content; a longer cache repeats them.
_CONTENT_TOKENS = 4096
# SGLang's default of --triton-attention-num-kv-splits.
_TRITON_KV_SPLITS = 8
# What SGLang gives FlashInfer.
_WORKSPACE_BYTES = 384 << 20


class Batch:
    """Queries of one decode step and the slots of its requests' tokens, shuffled over the cache."""

    def __init__(self, lengths: list[int], heads: Heads, device: torch.device, dtype: torch.dtype) -> None:
        self.lengths, self.heads, self.device, self.dtype = lengths, heads, device, dtype
        self.num_slots = 1 + sum(lengths)
        self.kv_indptr = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        # Slot 0 is SGLang's for padding.
        self.kv_indices = 1 + torch.randperm(sum(lengths), device=device).int()
        self.q = self.random(len(lengths), heads.num_qo_heads)

    def random(self, tokens: int, num_heads: int) -> torch.Tensor:
        return torch.randn(tokens, num_heads, self.heads.head_dim, device=self.device).to(self.dtype)


class Spark:
    """Rows, through the wrapper that the attention backend calls."""

    name = "spark"

    def __init__(self, batch: Batch, setting: Setting, copies: int = 1, rows: sk.LayerRows | None = None) -> None:
        self._q, self._sm_scale = batch.q, batch.heads.sm_scale
        if rows is None:
            rows = _filled_rows(batch, setting)
        clones = [
            dataclasses.replace(rows, keys=rows.keys.clone(), values=rows.values.clone()) for _ in range(copies - 1)
        ]
        self.layers = [rows, *clones]
        self.wrapper = sk.SparkBatchDecodeWrapper(
            batch.device, kv_indptr_buffer=batch.kv_indptr, kv_indices_buffer=batch.kv_indices
        )
        self.wrapper.plan(batch.kv_indptr, batch.kv_indices, *dataclasses.astuple(batch.heads))

    def run(self, copy: int) -> torch.Tensor:
        return self.wrapper.run(self._q, self.layers[copy], sm_scale=self._sm_scale)


class _Dense:
    """Keys and values, ``[num_slots, num_kv_heads, head_dim]`` each, a pair per copy."""

    def __init__(
        self,
        batch: Batch,
        dtype: torch.dtype,
        copies: int,
        cache: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        if cache is None:
            block = min(batch.num_slots, _CONTENT_TOKENS)
            pair = (batch.random(block, batch.heads.num_kv_heads).to(dtype) for _ in range(2))
            cache = tuple(_repeated(x, batch.num_slots) for x in pair)
        self._layers = [cache, *(tuple(x.clone() for x in cache) for _ in range(copies - 1))]


class FlashInfer(_Dense):
    """FlashInfer's paged decode, as SGLang's flashinfer backend sets it up."""

    def __init__(
        self,
        batch: Batch,
        dtype: torch.dtype,
        copies: int = 1,
        cache: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        super().__init__(batch, dtype, copies, cache)
        self._q = batch.q
        last_page_len = torch.ones(len(batch.lengths), dtype=torch.int32, device=batch.device)
        self._wrapper = BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=batch.device),
            "NHD",
            backend="fa2",
            use_cuda_graph=True,
            # SGLang's should_use_tensor_core.
            use_tensor_cores=dtype == torch.float8_e4m3fn or batch.heads.group >= 4,
            paged_kv_indptr_buffer=batch.kv_indptr.clone(),
            paged_kv_indices_buffer=batch.kv_indices.clone(),
            paged_kv_last_page_len_buffer=last_page_len.clone(),
        )
        self._wrapper.plan(
            batch.kv_indptr,
            batch.kv_indices,
            last_page_len,
            *dataclasses.astuple(batch.heads),
            1,
            q_data_type=batch.q.dtype,
            kv_data_type=dtype,
            sm_scale=batch.heads.sm_scale,
        )

    def run(self, copy: int) -> torch.Tensor:
        return self._wrapper.run(self._q, tuple(x.unsqueeze(1) for x in self._layers[copy]))


class SGLangTriton(_Dense):
    """SGLang's Triton decode, as its triton backend sets it up."""

    def __init__(
        self,
        batch: Batch,
        dtype: torch.dtype,
        copies: int = 1,
        cache: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        import triton
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
        from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

        super().__init__(batch, dtype, copies, cache)
        heads, size = batch.heads, len(batch.lengths)
        self._forward, self._batch = decode_attention_fwd, batch
        self._kv_indices = batch.kv_indices.long()
        self._out = torch.empty_like(batch.q)
        partial = (size, heads.num_qo_heads, _TRITON_KV_SPLITS)
        self._logits = torch.empty(*partial, heads.head_dim, dtype=torch.float32, device=batch.device)
        self._lse = torch.empty(partial, dtype=torch.float32, device=batch.device)
        self._num_kv_splits = torch.empty(size, dtype=torch.int32, device=batch.device)
        num_sms, self._use_pdl = 1, False
        if batch.device.type == "cuda":
            from sgl_kernel.utils import is_arch_support_pdl

            num_sms = torch.cuda.get_device_properties(batch.device).multi_processor_count
            self._use_pdl = is_arch_support_pdl()
        get_num_kv_splits_triton[(1,)](
            self._num_kv_splits,
            torch.tensor(batch.lengths, device=batch.device),
            size,
            1,
            heads.num_qo_heads,
            heads.num_kv_heads,
            _TRITON_KV_SPLITS,
            num_sms,
            MAX_NUM_SEQ=max(256, triton.next_power_of_2(size)),
        )

    def run(self, copy: int) -> torch.Tensor:
        self._forward(
            self._batch.q,
            *self._layers[copy],
            self._out,
            self._batch.kv_indptr,
            self._kv_indices,
            self._logits,
            self._lse,
            self._num_kv_splits,
            _TRITON_KV_SPLITS,
            self._batch.heads.sm_scale,
            1.0,
            1.0,
            use_pdl=self._use_pdl,
        )
        return self._out


class Copy:
    """A device copy that moves ``num_bytes``, half of them read and half of them written: the roofline."""

    def __init__(self, num_bytes: int, copies: int, device: torch.device) -> None:
        self._pairs = torch.zeros(copies, 2, max(1, num_bytes // 2), dtype=torch.uint8, device=device)

    def run(self, copy: int) -> torch.Tensor:
        source, destination = self._pairs[copy]
        return destination.copy_(source)


# Name of the timing, class, dtype of the cache.
DENSE_METHODS = {
    "flashinfer_bf16": (FlashInfer, torch.bfloat16),
    "flashinfer_fp8": (FlashInfer, torch.float8_e4m3fn),
    "triton": (SGLangTriton, torch.bfloat16),
}


def _filled_rows(batch: Batch, setting: Setting) -> sk.LayerRows:
    heads, block = batch.heads, min(batch.num_slots, _CONTENT_TOKENS)
    content = setting.rows(block, heads, batch.device)
    q, k, v = (batch.random(block, n) for n in (heads.num_qo_heads, heads.num_kv_heads, heads.num_kv_heads))
    sk.write_rows(q, k, v, torch.arange(block, device=batch.device), content)
    keys, values = (_repeated(x, batch.num_slots) for x in (content.keys, content.values))
    return dataclasses.replace(content, keys=keys, values=values)


def _repeated(block: torch.Tensor, length: int) -> torch.Tensor:
    """``block`` over and over, cut to ``length``."""
    out = torch.empty(length, *block.shape[1:], dtype=block.dtype, device=block.device)
    for start in range(0, length, len(block)):
        part = out[start : start + len(block)]
        part.copy_(block[: len(part)])
    return out
