"""Fused decode attention over rows: one query per request, no dense copy of the keys.

A program takes one KV head of a split, a range of one request's tokens. In the loop over its tokens **each lane has a
token of its own**: it reads the token's key row as 64-bit words and looks up, for each four bits of the restore plane
and for each kept word, a word of `spark_kernels.gpu.queries` with the contributions to four queries. So no lane waits
for another before the softmax, and what an unpacked key would take is never written anywhere. Weighted values are
summed by tensor cores.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from spark_kernels.gpu.merge import merge_splits
from spark_kernels.gpu.plan import DecodePlan
from spark_kernels.gpu.queries import PACK, num_packs, prepare_queries
from spark_kernels.gpu.rows import check_head_dim, float8_bits_to_half, value_rows
from spark_kernels.gpu.scores import RowLayout, group_scores, interleave
from spark_kernels.gpu.values import Int4Layout, load_int4
from spark_kernels.formats import CompressedKeyFormat, Int4ValueFormat, LayerRows, RawKeyFormat, ValueFormat

_LOG2_E = math.log2(math.e)
_LN2 = tl.constexpr(math.log(2.0))
# One token per lane.
NUM_WARPS = 4
BLOCK_N = 32 * NUM_WARPS
MAX_GROUP = 16


@triton.jit
def _decode_split(
    q_ptr,
    q_stride_token,
    q_stride_head,
    tables_ptr,
    scales_ptr,
    keys_ptr,
    values_ptr,
    indices_ptr,
    split_request_ptr,
    split_start_ptr,
    split_stop_ptr,
    out_ptr,
    lse_ptr,
    score_scale,
    soft_cap,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (split, KV head); query n of the group is column n.

    ``keys_ptr`` points to the key rows as 64-bit words, or as channels if they are raw; then ``LAYOUT`` is None.
    ``values_ptr`` points to int4 rows as 16-bit words, or to channels; then ``V_LAYOUT`` is None. Scores are in base 2.
    """
    # Neighbouring programs read the heads of the same tokens, which are neighbours in memory.
    split = tl.program_id(0) // NUM_KV_HEADS
    head = tl.program_id(0) % NUM_KV_HEADS
    request = tl.load(split_request_ptr + split).to(tl.int64)
    start = tl.load(split_start_ptr + split)
    stop = tl.load(split_stop_ptr + split)
    if start >= stop:
        return
    tokens = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, COLUMNS)
    v_channels = tl.arange(0, V_HEAD_DIM)
    VALUE: tl.constexpr = values_ptr.dtype.element_ty
    # float8 and int4 values are multiplied as float16: converting them to bfloat16 is slow.
    WEIGHT: tl.constexpr = VALUE if V_LAYOUT is None and VALUE.primitive_bitwidth > 8 else tl.float16
    # A dot product takes eight columns or more; for it, columns of zeros are put between those of a single pack.
    WIDE: tl.constexpr = COLUMNS if COLUMNS > 4 else 8

    if LAYOUT is None:
        channels = tl.arange(0, HEAD_DIM)
        q_offsets = request * q_stride_token + (head * GROUP + columns[None, :]) * q_stride_head + channels[:, None]
        q = tl.load(q_ptr + q_offsets, mask=columns[None, :] < GROUP, other=0.0).to(keys_ptr.dtype.element_ty)
    else:
        pack = (request * NUM_KV_HEADS + head) * PACKS
        tables = tables_ptr + pack * (5 * HEAD_DIM)
        scales = scales_ptr + pack * 8

    peak = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    acc = tl.zeros([V_HEAD_DIM, WIDE], tl.float32)
    for first in range(start, stop, BLOCK_N):
        live = first + tokens < stop
        slots = tl.load(indices_ptr + first + tokens, mask=live, other=0).to(tl.int64) * NUM_KV_HEADS + head
        if LAYOUT is None:
            k_offsets = slots[:, None] * HEAD_DIM + channels[None, :]
            k = tl.load(keys_ptr + k_offsets, mask=live[:, None], other=0.0)
            scores = tl.dot(k, q, input_precision="ieee")
        else:
            scores = group_scores(keys_ptr + slots * LAYOUT.row_words, tables, scales, LAYOUT, PACKS, BLOCK_N)
        scores *= score_scale
        if HAS_SOFT_CAP:
            # tanh(x) = 1 - 2 / (1 + e**2x), and 2 / ln(2) = 2.885390...
            scores = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * 2.8853900817779268)))
        scores = tl.where(live[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 0))
        rescale = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[None, :])
        total = total * rescale + tl.sum(weights, 0)
        peak = new_peak
        if WIDE != COLUMNS:
            weights = interleave(weights, tl.zeros_like(weights))
            rescale = tl.join(rescale, rescale).reshape(WIDE)
        if V_LAYOUT is None:
            v_offsets = slots[:, None] * V_HEAD_DIM + v_channels[None, :]
            if VALUE == tl.uint8:
                v = float8_bits_to_half(tl.load(values_ptr + v_offsets, mask=live[:, None], other=0))
            else:
                v = tl.load(values_ptr + v_offsets, mask=live[:, None], other=0.0).to(WEIGHT)
        else:
            v = load_int4(values_ptr, slots, live, V_LAYOUT)
        acc = tl.dot(tl.trans(v), weights.to(WEIGHT), acc * rescale[None, :], input_precision="ieee")

    out_query = split * NUM_KV_HEADS * GROUP + head * GROUP
    tl.store(lse_ptr + out_query + columns, peak * _LN2 + tl.log(total), mask=columns < GROUP)
    if WIDE != COLUMNS:
        total = tl.join(total, total).reshape(WIDE)
    wide_columns = tl.arange(0, WIDE)
    queries = wide_columns // (WIDE // COLUMNS)
    is_query = (queries < GROUP) & (wide_columns % (WIDE // COLUMNS) == 0)
    out_offsets = (out_query + queries[None, :]) * V_HEAD_DIM + v_channels[:, None]
    tl.store(out_ptr + out_offsets, acc / total[None, :], mask=is_query[None, :])


def decode_attention(
    q: torch.Tensor,
    rows: LayerRows,
    plan: DecodePlan,
    *,
    sm_scale: float,
    logits_soft_cap: float,
    v_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spark_kernels.reference.decode_attention`."""
    num_kv_heads, v_head_dim = rows.num_kv_heads, rows.value_format.head_dim
    check_head_dim(rows.key_format.head_dim)
    check_head_dim(v_head_dim)
    group = q.shape[1] // num_kv_heads
    if group > MAX_GROUP:
        raise NotImplementedError(f"{group} query heads per KV head: the GPU kernels take at most {MAX_GROUP}")
    q = q if q.stride(2) == 1 else q.contiguous()
    num_splits = plan.split_request.shape[0]
    split_out = torch.empty(num_splits, q.shape[1], v_head_dim, dtype=torch.float32, device=q.device)
    split_lse = torch.empty(num_splits, q.shape[1], dtype=torch.float32, device=q.device)
    keys = rows.keys.view(rows.key_format.dtype if rows.key_format.is_raw else torch.int64)
    values, factor = value_rows(rows)
    if num_splits:
        # Raw keys need no tables; the arguments are then not read.
        tables, scales = (q, q) if rows.key_format.is_raw else prepare_queries(q, num_kv_heads)
        scale, cap = sm_scale * _LOG2_E, 0.0
        if logits_soft_cap > 0:
            scale, cap = sm_scale / logits_soft_cap, logits_soft_cap * _LOG2_E
        _decode_split[(num_splits * num_kv_heads,)](
            q,
            q.stride(0),
            q.stride(1),
            tables,
            scales,
            keys,
            values,
            plan.kv_indices,
            plan.split_request,
            plan.split_start,
            plan.split_stop,
            split_out,
            split_lse,
            scale,
            cap,
            NUM_KV_HEADS=num_kv_heads,
            **variant(rows.key_format, rows.value_format, group),
            HAS_SOFT_CAP=logits_soft_cap > 0,
            num_warps=NUM_WARPS,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return merge_splits(split_out, split_lse, plan.request_splits, v_scale * factor)


def variant(
    key_format: CompressedKeyFormat | RawKeyFormat, value_format: ValueFormat | Int4ValueFormat, group: int
) -> dict[str, object]:
    """The compile-time arguments of `_decode_split` that follow from the formats and the group size."""
    packs = num_packs(group)
    return {
        "GROUP": group,
        "PACKS": packs,
        "HEAD_DIM": key_format.head_dim,
        "V_HEAD_DIM": value_format.head_dim,
        "LAYOUT": None if key_format.is_raw else RowLayout.of(key_format),
        "V_LAYOUT": Int4Layout.of(value_format) if value_format.is_int4 else None,
        "COLUMNS": max(8, PACK * packs) if key_format.is_raw else PACK * packs,
        "BLOCK_N": BLOCK_N,
    }
