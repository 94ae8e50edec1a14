"""Attention of new chunks: exact over themselves, over restored segments of their prefixes, merged by lse."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numba import prange

from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.restore import restore_keys, restore_values
from spark_kernels.cpu.threads import call_parallel
from spark_kernels.formats import Integers
from spark_kernels.reference import hadamard, hadamard_scales
from spark_kernels.rows import LayerRows

# Prefix tokens restored at a time if not said otherwise.
SEGMENT_TOKENS = 2048
# Queries per block where logits are written out, to bound their memory.
_QUERY_BLOCK = 256


@dataclass(frozen=True)
class ExtendPlan:
    """The requests of one extend step: spans of their new tokens and of their prefixes in ``prefix_indices``."""

    chunks: list[tuple[int, int]]
    prefixes: list[tuple[int, int]]
    prefix_indices: torch.Tensor
    causal: bool
    segment_tokens: int

    @classmethod
    def build(
        cls,
        qo_indptr: torch.Tensor,
        prefix_indptr: torch.Tensor,
        prefix_indices: torch.Tensor,
        causal: bool,
        segment_tokens: int,
        previous: ExtendPlan | None = None,
    ) -> ExtendPlan:
        """A plan of its own; it has no buffers to take over from ``previous``."""
        chunks, prefixes = (list(itertools.pairwise(x)) for x in (qo_indptr.tolist(), prefix_indptr.tolist()))
        return cls(chunks, prefixes, prefix_indices.to("cpu", torch.int64), causal, segment_tokens)


def extend_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: LayerRows,
    plan: ExtendPlan,
    *,
    sm_scale: float,
    logits_soft_cap: float,
    v_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spark_kernels.reference.extend_attention`.

    Products are in bfloat16 for bfloat16 queries and in float32 otherwise (float16 could overflow: a restored key
    may exceed 65504), sums, softmax and merging in float32.
    """
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = torch.zeros(*q.shape[:2], v.shape[2])
    lse = torch.full(q.shape[:2], -math.inf)
    workspace = torch.empty(min(plan.segment_tokens, plan.prefix_indices.shape[0]), *k.shape[1:])
    for (start, stop), (first, last) in zip(plan.chunks, plan.prefixes, strict=True):
        if start == stop:
            continue
        span = slice(start, stop)
        for begin in range(first, last, plan.segment_tokens):
            slots = plan.prefix_indices[begin : min(begin + plan.segment_tokens, last)]
            keys = restore_keys(rows, slots, workspace[: slots.shape[0]]).to(dtype)
            values = restore_values(rows, slots, v_scale, transformed=True).to(dtype)
            merge_into(out[span], lse[span], *_attention(q[span], keys, values, sm_scale, logits_soft_cap, False))
        if isinstance(rows.value_format, Integers):
            block = rows.value_format.block
            out[span] = hadamard(out[span], block) * hadamard_scales(block)[1]
        merge_into(out[span], lse[span], *_attention(q[span], k[span], v[span], sm_scale, logits_soft_cap, plan.causal))
    return out, lse


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, logits_soft_cap: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and lse of one request; see `spark_kernels.reference.dense_attention`. At least one query and key."""
    if logits_soft_cap > 0 or v.shape[2] != q.shape[2]:
        return _written_out_attention(q, k, v, sm_scale, logits_soft_cap, causal)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=causal, scale=sm_scale
    )
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _written_out_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, logits_soft_cap: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What SDPA cannot do: a soft cap, or values with a head_dim of their own."""
    n, num_qo_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    out = torch.empty(n, num_qo_heads, v.shape[2])
    lse = torch.empty(n, num_qo_heads)
    keys, values = k.float().permute(1, 2, 0), v.float().transpose(0, 1)
    for start in range(0, n, _QUERY_BLOCK):
        block = q[start : start + _QUERY_BLOCK].float().view(-1, num_kv_heads, num_qo_heads // num_kv_heads, head_dim)
        logits = torch.einsum("nhgd,hdm->hgnm", block, keys) * sm_scale
        if logits_soft_cap > 0:
            logits = logits.div_(logits_soft_cap).tanh_().mul_(logits_soft_cap)
        if causal:
            hidden = torch.ones(logits.shape[2:], dtype=torch.bool).triu(start + 1)
            logits.masked_fill_(hidden, -math.inf)
        stop = start + block.shape[0]
        lse[start:stop] = logits.logsumexp(-1).permute(2, 0, 1).flatten(1)
        out[start:stop] = torch.einsum("hgnm,hmd->nhgd", logits.softmax(-1), values).flatten(1, 2)
    return out, lse


@kernel(parallel=True)
def _merge_into(out, lse, other, other_lse):
    for work in prange(lse.shape[0] * lse.shape[1]):
        token = work // lse.shape[1]
        head = work % lse.shape[1]
        a, b = lse[token, head], other_lse[token, head]
        if b == -np.inf:
            if a == -np.inf:
                out[token, head] = np.float32(0.0)
            continue
        if a == -np.inf:
            out[token, head] = other[token, head]
            lse[token, head] = b
            continue
        high = max(a, b)
        weight_a, weight_b = np.exp(a - high), np.exp(b - high)
        total = weight_a + weight_b
        for j in range(out.shape[2]):
            out[token, head, j] = (weight_a * out[token, head, j] + weight_b * other[token, head, j]) / total
        lse[token, head] = high + np.log(total)


def merge_into(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """`spark_kernels.reference.merge_state` in place: the result is in ``out`` and ``lse``, contiguous float32."""
    call_parallel(
        _merge_into, out.numpy(), lse.numpy(), other.float().contiguous().numpy(), other_lse.contiguous().numpy()
    )


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spark_kernels.reference.merge_state`."""
    out = out_a.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    lse = lse_a.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    merge_into(out, lse, out_b, lse_b)
    return out, lse
