"""Attention over a union of sets of keys from the attention over each, by log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_QUERIES = 8


@triton.jit
def _merge_splits(
    split_out_ptr,
    split_lse_ptr,
    request_splits_ptr,
    out_ptr,
    lse_ptr,
    out_scale,
    NUM_QO_HEADS: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
):
    """One program per (request, query head), over the request's splits in order."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(request_splits_ptr + request).to(tl.int64)
    last = tl.load(request_splits_ptr + request + 1).to(tl.int64)
    channels = tl.arange(0, V_HEAD_DIM)
    peak = float("-inf")
    total = 0.0
    acc = tl.zeros([V_HEAD_DIM], tl.float32)
    for split in range(first, last):
        query = split * NUM_QO_HEADS + head
        split_lse = tl.load(split_lse_ptr + query)
        new_peak = tl.maximum(peak, split_lse)
        rescale = tl.exp(peak - new_peak)
        weight = tl.exp(split_lse - new_peak)
        acc = acc * rescale + weight * tl.load(split_out_ptr + query * V_HEAD_DIM + channels)
        total = total * rescale + weight
        peak = new_peak
    query = request * NUM_QO_HEADS + head
    # A request without tokens gets 0 and -inf.
    tl.store(out_ptr + query * V_HEAD_DIM + channels, acc * (out_scale / tl.where(last > first, total, 1.0)))
    tl.store(lse_ptr + query, peak + tl.log(total))


@triton.jit
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
):
    """One program per block of queries."""
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
    # The output over no keys is not read: nothing says that it is a number.
    merged = tl.where(weight_a > 0, a * weight_a, 0.0) + tl.where(weight_b > 0, b * weight_b, 0.0)
    merged = tl.where(total != total, total, merged / tl.where(total > 0, total, 1.0))
    tl.store(out_ptr + offsets, merged, mask=inside)


def merge_splits(
    split_out: torch.Tensor, split_lse: torch.Tensor, request_splits: torch.Tensor, out_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of each request from those of its splits.

    Parameters
    ----------
    split_out, split_lse
        float32 ``[num_splits, num_qo_heads, v_head_dim]`` and ``[num_splits, num_qo_heads]``.
    request_splits
        int32 ``[batch + 1]``, see `DecodePlan`.
    out_scale
        Factor of the output.
    """
    _, num_qo_heads, v_head_dim = split_out.shape
    batch = request_splits.shape[0] - 1
    out = torch.empty(batch, num_qo_heads, v_head_dim, dtype=torch.float32, device=split_out.device)
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
            num_warps=2,
        )
    return out, lse


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spark_kernels.reference.merge_state`."""
    out = torch.empty(out_a.shape, dtype=torch.float32, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    _launch_merge_state(out_a.contiguous(), lse_a.contiguous(), out_b, lse_b, out, lse)
    return out, lse


def merge_into(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """`spark_kernels.reference.merge_state` in place: the result is in ``out`` and ``lse``, contiguous float32."""
    _launch_merge_state(out, lse, other, other_lse, out, lse)


def _launch_merge_state(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    if lse.numel():
        _merge_state[(triton.cdiv(lse.numel(), _BLOCK_QUERIES),)](
            out_a,
            lse_a,
            out_b.contiguous(),
            lse_b.contiguous(),
            out,
            lse,
            lse.numel(),
            out.shape[-1],
            BLOCK=triton.next_power_of_2(out.shape[-1]),
            BLOCK_QUERIES=_BLOCK_QUERIES,
            num_warps=4,
        )
