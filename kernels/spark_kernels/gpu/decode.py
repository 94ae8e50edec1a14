"""Fused decode attention over rows: one query per request, no dense copy of the keys.

A program takes one KV head of a split, a range of one request's tokens. Codes of keys become tiles of float16 that
tensor cores multiply with queries in the same order of positions; kept channels look up their queries' entries; tensor
cores sum the weighted values, which stay transformed if they are integers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from spark_kernels.formats import Integers, KeyFormat, Numbers, ValueFormat
from spark_kernels.gpu.merge import merge_splits
from spark_kernels.gpu.plan import DecodePlan
from spark_kernels.gpu.queries import num_columns, prepare_queries
from spark_kernels.gpu.rows import (
    IntegersLayout,
    PrunedLayout,
    check_head_dim,
    float8_bits_to_half,
    key_rows,
    load_half,
    value_rows,
)
from spark_kernels.gpu.unpack import load_integers, load_plane
from spark_kernels.reference import hadamard_scales
from spark_kernels.rows import LayerRows

_LOG2_E = math.log2(math.e)
_LN2 = tl.constexpr(math.log(2.0))
NUM_WARPS = 4
BLOCK_N = 64
# By the larger head_dim: programs share an SM by threes, of the longest heads by twos, and none spills. ptxas alone
# chooses 96 to 144 and spills a little; at 128, four programs fit and heads of 256 and groups of 16 spill.
REGISTERS = {64: 168, 128: 168, 256: 224}
MAX_GROUP = 16
# Channels of a tensor-core product over codes, at least. It takes 16, but Triton 3.7.1 miscompiles a product over 16
# whose operand it unpacks from bytes: some channels count twice, others not at all.
_LEAST_WIDTH = 32


@triton.jit
def _query_tile(table, FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Queries at the ``COUNT`` positions from ``FIRST`` on, ``[WIDTH, COLUMNS]``; 0 beyond them."""
    position = tl.arange(0, WIDTH)[:, None]
    entries = table + (FIRST + position) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(entries, mask=position < COUNT, other=0.0)


@triton.jit
def _kept_scores(row, live, table, LAYOUT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Products of the queries with the kept integers, in units of kappa and of the table, ``[BLOCK_N, COLUMNS]``."""
    columns = tl.arange(0, COLUMNS)[None, :]
    halves = row.to(tl.pointer_type(tl.uint16))
    scores = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    # Triton 3.6 takes no field of a tuple here.
    FIRST: tl.constexpr = LAYOUT.kept_half
    LAST: tl.constexpr = LAYOUT.kept_half + LAYOUT.kept_channels
    for i in tl.static_range(FIRST, LAST):
        word = tl.load(halves + i, mask=live, other=0).to(tl.int32)
        position = word >> LAYOUT.magnitude_bits & ((1 << LAYOUT.position_bits) - 1)
        magnitude = (word & ((1 << LAYOUT.magnitude_bits) - 1)).to(tl.float32)
        integer = tl.where(word >> 15 > 0, -magnitude, magnitude)
        scores += integer[:, None] * tl.load(table + position[:, None] * COLUMNS + columns).to(tl.float32)
    return scores


@triton.jit(do_not_specialize_on_alignment=["indices_ptr", "split_request_ptr", "split_start_ptr", "split_stop_ptr"])
def _decode_split(
    q_ptr,
    q_stride_token,
    q_stride_head,
    tables_ptr,
    scalars_ptr,
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
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    WIDTH_4: tl.constexpr,
    WIDTH_2: tl.constexpr,
    WIDTH_1: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (split, KV head); query n of the group is column n.

    ``keys_ptr`` and ``values_ptr`` point to bytes, or to numbers; then ``LAYOUT`` and ``V_LAYOUT`` are None.
    ``WIDTH_w`` are powers of two that hold the channels with w bits. Scores are in base 2.
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
    # float8 and integer values are multiplied as float16: converting them to bfloat16 is slow.
    WEIGHT: tl.constexpr = VALUE if V_LAYOUT is None and VALUE.primitive_bitwidth > 8 else tl.float16

    if LAYOUT is None:
        channels = tl.arange(0, HEAD_DIM)
        q_offsets = request * q_stride_token + (head * GROUP + columns[None, :]) * q_stride_head + channels[:, None]
        q = tl.load(q_ptr + q_offsets, mask=columns[None, :] < GROUP, other=0.0).to(keys_ptr.dtype.element_ty)
    else:
        index = request * NUM_KV_HEADS + head
        code_table = tables_ptr + index * (2 * HEAD_DIM * COLUMNS)
        kept_table = code_table + HEAD_DIM * COLUMNS
        scalars = scalars_ptr + index * (4 * COLUMNS) + columns
        code_scale = tl.load(scalars)[None, :]
        kept_scale = tl.load(scalars + COLUMNS)[None, :]
        of_middles = tl.load(scalars + 2 * COLUMNS)[None, :]
        of_centre = tl.load(scalars + 3 * COLUMNS)[None, :]
        if WIDTH_4:
            q_4 = _query_tile(code_table, 0, LAYOUT.count_4, WIDTH_4, COLUMNS)
        if WIDTH_2:
            q_2 = _query_tile(code_table, LAYOUT.count_4, LAYOUT.count_2, WIDTH_2, COLUMNS)
        if WIDTH_1:
            q_1 = _query_tile(code_table, LAYOUT.count_4 + LAYOUT.count_2, LAYOUT.count_1, WIDTH_1, COLUMNS)

    peak = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    acc = tl.zeros([V_HEAD_DIM, COLUMNS], tl.float32)
    for first in range(start, stop, BLOCK_N):
        live = first + tokens < stop
        slots = tl.load(indices_ptr + first + tokens, mask=live, other=0).to(tl.int64) * NUM_KV_HEADS + head
        if LAYOUT is None:
            k_offsets = slots[:, None] * HEAD_DIM + channels[None, :]
            k = tl.load(keys_ptr + k_offsets, mask=live[:, None], other=0.0)
            scores = tl.dot(k, q, input_precision="ieee")
        else:
            row = keys_ptr + slots * LAYOUT.row_bytes
            scores = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
            if WIDTH_4:
                scores = tl.dot(load_plane(row, live, 0, 4, LAYOUT.count_4, WIDTH_4 // 2), q_4, scores)
            if WIDTH_2:
                scores = tl.dot(load_plane(row, live, LAYOUT.first_2, 2, LAYOUT.count_2, WIDTH_2 // 4), q_2, scores)
            if WIDTH_1:
                scores = tl.dot(load_plane(row, live, LAYOUT.first_1, 1, LAYOUT.count_1, WIDTH_1 // 8), q_1, scores)
            tau = load_half(row, LAYOUT.scale_half)[:, None]
            kappa = load_half(row, LAYOUT.scale_half + 1)[:, None]
            kept = _kept_scores(row, live, kept_table, LAYOUT, COLUMNS, BLOCK_N)
            scores = tau * (scores * code_scale + of_middles) + kappa * (kept * kept_scale) + of_centre
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
        if V_LAYOUT is None:
            v_offsets = slots[:, None] * V_HEAD_DIM + v_channels[None, :]
            if VALUE == tl.uint8:
                v = float8_bits_to_half(tl.load(values_ptr + v_offsets, mask=live[:, None], other=0))
            else:
                v = tl.load(values_ptr + v_offsets, mask=live[:, None], other=0.0).to(WEIGHT)
        else:
            v = load_integers(values_ptr + slots * V_LAYOUT.row_bytes, live, V_LAYOUT)
        acc = tl.dot(tl.trans(v), weights.to(WEIGHT), acc * rescale[None, :], input_precision="ieee")

    out_query = split * NUM_KV_HEADS * GROUP + head * GROUP
    tl.store(lse_ptr + out_query + columns, peak * _LN2 + tl.log(total), mask=columns < GROUP)
    out_offsets = (out_query + columns[None, :]) * V_HEAD_DIM + v_channels[:, None]
    tl.store(out_ptr + out_offsets, acc / total[None, :], mask=columns[None, :] < GROUP)


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
    values, factor = value_rows(rows)
    if num_splits:
        is_numbers = isinstance(rows.key_format, Numbers)
        # Keys that are numbers need no tables; the arguments are then not read.
        tables, scalars = (q, q) if is_numbers else prepare_queries(q, rows)
        scale, cap = sm_scale * _LOG2_E, 0.0
        if logits_soft_cap > 0:
            scale, cap = sm_scale / logits_soft_cap, logits_soft_cap * _LOG2_E
        _decode_split[(num_splits * num_kv_heads,)](
            q,
            q.stride(0),
            q.stride(1),
            tables,
            scalars,
            key_rows(rows),
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
            maxnreg=REGISTERS[max(rows.key_format.head_dim, v_head_dim)],
            enable_fp_fusion=True,
        )
    made = rows.value_format
    back = hadamard_scales(made.block)[1] if isinstance(made, Integers) else 0.0
    return merge_splits(split_out, split_lse, plan.request_splits, v_scale * factor, back, q.dtype)


def variant(key_format: KeyFormat, value_format: ValueFormat, group: int) -> dict[str, object]:
    """The compile-time arguments of `_decode_split` that follow from the formats and the group size."""
    layout = PrunedLayout.of(key_format)
    counts = (layout.count_4, layout.count_2, layout.count_1) if layout else (0, 0, 0)
    widths = (max(_LEAST_WIDTH, triton.next_power_of_2(count)) if count else 0 for count in counts)
    return {
        "GROUP": group,
        "COLUMNS": num_columns(group),
        "HEAD_DIM": key_format.head_dim,
        "V_HEAD_DIM": value_format.head_dim,
        "LAYOUT": layout,
        "V_LAYOUT": IntegersLayout.of(value_format),
        **dict(zip(("WIDTH_4", "WIDTH_2", "WIDTH_1"), widths, strict=True)),
        "BLOCK_N": BLOCK_N,
    }
