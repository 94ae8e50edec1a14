"""Attention over a union of sets of keys from the attention over each, by log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_QUERIES = 8
_BLOCK_SPLITS = 16


@triton.jit
def transform(x):
    """`spark_kernels.reference.hadamard` of each row of ``x``, a power of two of channels."""
    channels = tl.arange(0, x.shape[1])[None, :] + tl.zeros_like(x).to(tl.int32)
    for stage in tl.static_range(8):
        if (1 << stage) < x.shape[1]:
            other = tl.gather(x, channels ^ (1 << stage), 1)
            x = tl.where((channels & (1 << stage)) > 0, other - x, x + other)
    return x


@triton.jit(do_not_specialize_on_alignment=["split_lse_ptr", "request_splits_ptr", "lse_ptr"])
def _merge_splits(
    split_out_ptr,
    split_lse_ptr,
    request_splits_ptr,
    out_ptr,
    lse_ptr,
    out_scale,
    NUM_QO_HEADS: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BACK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program per (request, query head), over ``SPLITS`` of the request's splits at a time.

    The output is transformed back, and multiplied by ``BACK``, if that is not 0.
    """
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(request_splits_ptr + request).to(tl.int64)
    last = tl.load(request_splits_ptr + request + 1).to(tl.int64)
    channels = tl.arange(0, V_HEAD_DIM)
    peak = float("-inf")
    total = 0.0
    acc = tl.zeros([V_HEAD_DIM], tl.float32)
    for start in range(first, last, SPLITS):
        split = start + tl.arange(0, SPLITS)
        query = split * NUM_QO_HEADS + head
        split_lse = tl.load(split_lse_ptr + query, mask=split < last, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(split_lse, 0))
        rescale = tl.exp(peak - new_peak)
        weights = tl.exp(split_lse - new_peak)
        offsets = query[:, None] * V_HEAD_DIM + channels[None, :]
        parts = tl.load(split_out_ptr + offsets, mask=(split < last)[:, None], other=0.0)
        acc = acc * rescale + tl.sum(weights[:, None] * parts, 0)
        total = total * rescale + tl.sum(weights, 0)
        peak = new_peak
    # A request without tokens gets 0 and -inf.
    out = acc[None, :] * (out_scale / tl.where(last > first, total, 1.0))
    if BACK > 0:
        out = transform(out) * BACK
    query = request * NUM_QO_HEADS + head
    tl.store(out_ptr + query * V_HEAD_DIM + channels[None, :], out.to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + query, peak + tl.log(total))


@triton.jit(do_not_specialize=["num_queries"], do_not_specialize_on_alignment=["lse_a_ptr", "lse_b_ptr", "lse_ptr"])
def _merge_state(
    out_a_ptr,
    lse_a_ptr,
    out_b_ptr,
    lse_b_ptr,
    out_ptr,
    lse_ptr,
    num_queries,
    V_HEAD_DIM,
    BLOCK: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BACK: tl.constexpr,
):
    """One program per block of queries; ``b`` is transformed back first, and multiplied by ``BACK``, if that is not 0.

    Outputs alias no inputs: a warp may read a block's inputs after another has written its outputs.
    """
    query = tl.program_id(0).to(tl.int64) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    exists = query < num_queries
    channels = tl.arange(0, BLOCK)[None, :]
    inside = exists[:, None] & (channels < V_HEAD_DIM)
    offsets = query[:, None] * V_HEAD_DIM + channels
    lse_a = tl.load(lse_a_ptr + query, mask=exists, other=0.0)
    lse_b = tl.load(lse_b_ptr + query, mask=exists, other=0.0)
    peak = tl.maximum(lse_a, lse_b)
    safe_peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.exp(lse_a - safe_peak) + tl.exp(lse_b - safe_peak)
    tl.store(lse_ptr + query, safe_peak + tl.log(total), mask=exists)
    weight_a = tl.exp(lse_a - safe_peak)[:, None]
    weight_b = tl.exp(lse_b - safe_peak)[:, None]
    total = total[:, None]
    a = tl.load(out_a_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(out_b_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if BACK > 0:
        b = transform(b) * BACK
    # The output over no keys is not read: nothing says that it is a number.
    merged = tl.where(weight_a > 0, a * weight_a, 0.0) + tl.where(weight_b > 0, b * weight_b, 0.0)
    merged = tl.where(total != total, total, merged / tl.where(total > 0, total, 1.0))
    tl.store(out_ptr + offsets, merged, mask=inside)


def merge_splits(
    split_out: torch.Tensor,
    split_lse: torch.Tensor,
    request_splits: torch.Tensor,
    out_scale: float,
    back: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, in ``dtype``, and lse of each request from those of its splits.

    Parameters
    ----------
    split_out, split_lse
        float32 ``[num_splits, num_qo_heads, v_head_dim]`` and ``[num_splits, num_qo_heads]``.
    request_splits
        int32 ``[batch + 1]``, see `DecodePlan`.
    out_scale
        Factor of the output.
    back
        Of transformed values the factor after the transform back, and else 0.
    """
    _, num_qo_heads, v_head_dim = split_out.shape
    batch = request_splits.shape[0] - 1
    out = torch.empty(batch, num_qo_heads, v_head_dim, dtype=dtype, device=split_out.device)
    lse = torch.empty(batch, num_qo_heads, dtype=torch.float32, device=split_out.device)
    if batch:
        _merge_splits[(batch, num_qo_heads)](
            split_out,
            split_lse,
            request_splits,
            out,
            lse,
            out_scale,
            NUM_QO_HEADS=num_qo_heads,
            V_HEAD_DIM=v_head_dim,
            BACK=back,
            SPLITS=_BLOCK_SPLITS,
            num_warps=4,
        )
    return out, lse


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, back: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spark_kernels.reference.merge_state`; ``back`` as in `merge_splits`, of ``out_b`` alone."""
    out = torch.empty(out_a.shape, dtype=torch.float32, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    if lse.numel():
        _merge_state[(triton.cdiv(lse.numel(), _BLOCK_QUERIES),)](
            out_a.contiguous(),
            lse_a.contiguous(),
            out_b.contiguous(),
            lse_b.contiguous(),
            out,
            lse,
            lse.numel(),
            out.shape[-1],
            BLOCK=triton.next_power_of_2(out.shape[-1]),
            BLOCK_QUERIES=_BLOCK_QUERIES,
            BACK=back,
            num_warps=4,
        )
    return out, lse
