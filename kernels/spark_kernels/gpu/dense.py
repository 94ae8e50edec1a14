"""Attention over dense keys and values of a ragged batch, with log-sum-exp.

FlashInfer's where it is installed and takes the shapes (`spark_kernels.gpu.dense_flashinfer`), as the fastest there is,
and the Triton kernel below for everything else: float32, values with a head_dim of their own, AMD's GPUs. The kernel
is our own because it can then be tested where there is no GPU, under Triton's interpreter. SGLang's extend kernel would
bring SGLang in, and PyTorch's ``varlen_attn`` has no soft cap and no float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property

import torch
import triton
import triton.language as tl

from spark_kernels.gpu import dense_flashinfer
from spark_kernels.gpu.plan import batch_block
from spark_kernels.gpu.rows import check_head_dim

_LOG2_E = math.log2(math.e)
_LN2 = tl.constexpr(math.log(2.0))
# Rows of queries and keys per step, and warps, by the larger head_dim: what keeps everything in registers.
_BLOCKS = {64: (64, 64, 4), 128: (128, 32, 8), 256: (64, 16, 8)}
_FLOAT32_BLOCKS = (16, 16, 4)


class RaggedBatch:
    """Requests with queries and keys of their own, planned once for all layers.

    Parameters
    ----------
    qo_bounds, kv_bounds
        Where the requests' queries and keys begin, and the last ones end: ``batch + 1`` numbers each.
    causal
        Whether the j-th query of a request sees its first j + 1 keys only, and not all.
    device
        Where queries and keys are.
    wrappers
        Where FlashInfer's wrapper comes from, by ``number``: no two batches that are planned at one time may have
        the same.
    """

    def __init__(
        self,
        qo_bounds: Sequence[int],
        kv_bounds: Sequence[int],
        causal: bool,
        device: torch.device,
        wrappers: dense_flashinfer.Wrappers,
        number: int,
    ) -> None:
        self._bounds = torch.tensor([qo_bounds, kv_bounds], dtype=torch.int32)
        self._causal = causal
        self._device = device
        self._wrappers = wrappers
        self._number = number
        self._planned: tuple | None = None

    @cached_property
    def _indptr(self) -> torch.Tensor:
        bounds = self._bounds.pin_memory() if self._device.type == "cuda" else self._bounds
        return bounds.to(self._device, non_blocking=True)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sm_scale: float, logits_soft_cap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of one layer.

        ``q`` is ``[num_queries, num_qo_heads, head_dim]``, ``k`` and ``v`` are ``[num_keys, num_kv_heads, head_dim]``
        (``v`` with its own head_dim), of one dtype. Returns the output in that dtype and the natural-log lse, float32
        ``[num_queries, num_qo_heads]``; a query that sees nothing gets 0 and -inf, or an lse too small to matter.
        """
        if dense_flashinfer.serves(q, v):
            with dense_flashinfer.may_fail_at_first():
                wrapper = self._wrappers.get(self._number, self._device)
                variant = (q.shape[1], k.shape[1], q.shape[2], q.dtype, sm_scale, logits_soft_cap)
                # As a rule all layers are alike.
                if self._planned != variant:
                    wrapper.plan(*self._bounds, self._causal, *variant)
                    self._planned = variant
                return wrapper.run(q, k, v)
        return _attend(q, k, v, *self._indptr, self._causal, sm_scale, logits_soft_cap)


def pieces(bounds: Sequence[int], start: int, stop: int) -> tuple[int, int, list[int]]:
    """What the range ``start .. stop - 1`` of a ragged batch holds.

    Returns the first request with a part in it, the first request after the last such, and where the parts of those
    requests begin and end, counted from ``start``.
    """
    touched = [r for r, (a, b) in enumerate(itertools.pairwise(bounds)) if max(a, start) < min(b, stop)]
    first, last = touched[0], touched[-1] + 1
    return first, last, [min(max(bound, start), stop) - start for bound in bounds[first : last + 1]]


@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["lse_ptr", "qo_indptr_ptr", "kv_indptr_ptr"])
def _ragged_attention(
    q_ptr,
    q_stride_token,
    q_stride_head,
    k_ptr,
    k_stride_token,
    k_stride_head,
    v_ptr,
    v_stride_token,
    v_stride_head,
    out_ptr,
    lse_ptr,
    qo_indptr_ptr,
    kv_indptr_ptr,
    batch,
    score_scale,
    soft_cap,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (block of queries, KV head); scores are in base 2.

    The queries of a GQA group are rows of one block, ``token * GROUP + member``, so that they share each key they
    read. Blocks are counted request after request; those beyond the last have nothing to do.
    """
    head = tl.program_id(1)
    requests = tl.arange(0, BATCH_BLOCK)
    exists = requests < batch
    starts = tl.load(qo_indptr_ptr + requests, mask=exists, other=0)
    stops = tl.load(qo_indptr_ptr + requests + 1, mask=exists, other=0)
    blocks = tl.cdiv((stops - starts) * GROUP, BLOCK_M)
    is_before = (tl.cumsum(blocks, 0) <= tl.program_id(0)) & exists
    request = tl.sum(is_before.to(tl.int32), 0)
    if request >= batch:
        return
    first = (tl.program_id(0) - tl.sum(tl.where(is_before, blocks, 0), 0)) * BLOCK_M
    q_start = tl.load(qo_indptr_ptr + request)
    num_queries = tl.load(qo_indptr_ptr + request + 1) - q_start
    k_start = tl.load(kv_indptr_ptr + request)
    num_keys = tl.load(kv_indptr_ptr + request + 1) - k_start

    rows = first + tl.arange(0, BLOCK_M)
    live = rows < num_queries * GROUP
    token = rows // GROUP
    q_head = head * GROUP + rows % GROUP
    q_token = (q_start + token).to(tl.int64)
    channels = tl.arange(0, HEAD_DIM)
    v_channels = tl.arange(0, V_HEAD_DIM)
    q_offsets = (q_token * q_stride_token + q_head * q_stride_head)[:, None] + channels[None, :]
    q = tl.load(q_ptr + q_offsets, mask=live[:, None], other=0.0)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V_HEAD_DIM], tl.float32)
    last = num_keys
    if CAUSAL:
        last = tl.minimum(last, (first + BLOCK_M - 1) // GROUP + 1)
    for begin in range(0, last, BLOCK_N):
        keys = begin + tl.arange(0, BLOCK_N)
        inside = keys < num_keys
        k_token = (k_start + keys).to(tl.int64)
        k_offsets = (k_token * k_stride_token)[None, :] + head * k_stride_head + channels[:, None]
        k = tl.load(k_ptr + k_offsets, mask=inside[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * score_scale
        if HAS_SOFT_CAP:
            # tanh(x) = 1 - 2 / (1 + e**2x), and 2 / ln(2) = 2.885390...
            scores = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * 2.8853900817779268)))
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= token[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        # The first block has a key that every query sees, so this is never -inf.
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        rescale = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[:, None])
        total = total * rescale + tl.sum(weights, 1)
        peak = new_peak
        v_offsets = (k_token * v_stride_token)[:, None] + head * v_stride_head + v_channels[None, :]
        v = tl.load(v_ptr + v_offsets, mask=inside[:, None], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")

    query = q_token * (NUM_KV_HEADS * GROUP) + q_head
    out = acc / tl.where(num_keys > 0, total, 1.0)[:, None]
    out_offsets = query[:, None] * V_HEAD_DIM + v_channels[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=live[:, None])
    tl.store(lse_ptr + query, peak * _LN2 + tl.log(total), mask=live)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    causal: bool,
    sm_scale: float,
    logits_soft_cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_head_dim(q.shape[2])
    check_head_dim(v.shape[2])
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    num_queries, num_qo_heads, head_dim = q.shape
    num_kv_heads, v_head_dim = k.shape[1], v.shape[2]
    batch, group = qo_indptr.shape[0] - 1, num_qo_heads // num_kv_heads
    out = torch.empty(num_queries, num_qo_heads, v_head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_queries, num_qo_heads, dtype=torch.float32, device=q.device)
    if num_queries == 0:
        return out, lse
    is_float32 = q.dtype == torch.float32
    block_m, block_n, num_warps = _FLOAT32_BLOCKS if is_float32 else _BLOCKS[max(head_dim, v_head_dim)]
    scale, cap = sm_scale * _LOG2_E, 0.0
    if logits_soft_cap > 0:
        scale, cap = sm_scale / logits_soft_cap, logits_soft_cap * _LOG2_E
    _ragged_attention[(triton.cdiv(num_queries * group, block_m) + batch, num_kv_heads)](
        q,
        q.stride(0),
        q.stride(1),
        k,
        k.stride(0),
        k.stride(1),
        v,
        v.stride(0),
        v.stride(1),
        out,
        lse,
        qo_indptr,
        kv_indptr,
        batch,
        scale,
        cap,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        CAUSAL=causal,
        HAS_SOFT_CAP=logits_soft_cap > 0,
        BATCH_BLOCK=batch_block(batch),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=num_warps,
        num_stages=2,
        enable_fp_fusion=True,
    )
    return out, lse
