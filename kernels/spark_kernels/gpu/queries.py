"""Queries in the form the decode kernel looks them up: once per layer call, before any token is read.

Queries of a GQA group are taken four at a time, a *pack*: query n of the group is member ``n // packs`` of pack
``n % packs``. Each lookup of a pack is one 64-bit word with 16 bits per member:

- the *query words*, ``[head_dim]``: the query's channel as float16, after division by a power of two;
- the *sum table*, ``[head_dim / 4, 16]``: entry n of group i is ``q[4i] ± ...``, the signed sum of four channels
  under the bits of n (1 adds, 0 subtracts), in fixed point and biased to be positive. 13 bits, so that eight entries
  add up within 16 bits and two queries are added by one 32-bit instruction.

The largest sum of a query is 4095 units, so that rounding a sum costs at most 1/8190 of the largest one: less than
the rounding of queries to bfloat16, which is what they come from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PACK = 4
SUM_BIAS = tl.constexpr(4096)
_SUM_MAX = tl.constexpr(4095.0)


@triton.jit
def _power_of_two_above(x):
    """The power of two in (x, 2x] for a normal float32 x, from its exponent bits."""
    return ((x.to(tl.int32, bitcast=True) & 0x7F800000) + 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def _prepare_queries(
    q_ptr,
    q_stride_token,
    q_stride_head,
    tables_ptr,
    scales_ptr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PACKS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
):
    """One program per (request, KV head, pack)."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pack = tl.program_id(2)
    index = (request * NUM_KV_HEADS + head) * PACKS + pack
    channels = tl.arange(0, HEAD_DIM)
    groups = tl.arange(0, HEAD_DIM // 4)
    entries = tl.arange(0, 16)
    query_words = tl.zeros([HEAD_DIM], tl.int64)
    sum_words = tl.zeros([HEAD_DIM // 4, 16], tl.int64)
    for member in tl.static_range(4):
        query = member * PACKS + pack
        q_row = q_ptr + request * q_stride_token + (head * GROUP + query) * q_stride_head
        # None beyond the group: its words are zeros.
        num_channels = tl.where(query < GROUP, HEAD_DIM, 0)
        q = tl.load(q_row + channels, mask=channels < num_channels, other=0.0).to(tl.float32)
        # NaN if any channel is not finite; kept in the scales, because integers below cannot hold it.
        poison = tl.sum(q * 0.0, 0)
        query_scale = _power_of_two_above(tl.maximum(tl.max(tl.abs(q), 0), 1e-30))
        halves = (q / query_scale).to(tl.float16).to(tl.int16, bitcast=True)
        query_words |= (halves.to(tl.int64) & 0xFFFF) << (16 * member)

        sums = tl.zeros([HEAD_DIM // 4, 16], tl.float32)
        for bit in tl.static_range(4):
            x = tl.load(q_row + 4 * groups + bit, mask=groups < num_channels, other=0.0).to(tl.float32)
            sign = (2 * ((entries >> bit) & 1) - 1).to(tl.float32)
            sums += x[:, None] * sign[None, :]
        unit = tl.maximum(tl.max(tl.max(tl.abs(sums), 1), 0), 1e-30) / _SUM_MAX
        fixed = tl.floor(sums / unit + 0.5).to(tl.int32) + SUM_BIAS
        sum_words |= (fixed.to(tl.int64) & 0xFFFF) << (16 * member)
        tl.store(scales_ptr + index * 8 + member, unit + poison)
        tl.store(scales_ptr + index * 8 + 4 + member, query_scale + poison)
    table = tables_ptr + index * TABLE_WORDS
    tl.store(table + channels, query_words)
    tl.store(table + HEAD_DIM + 16 * groups[:, None] + entries[None, :], sum_words)


def num_packs(group: int) -> int:
    """Packs of a GQA group, a power of two."""
    return triton.next_power_of_2(triton.cdiv(group, PACK))


def prepare_queries(q: torch.Tensor, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Query words and sum tables of ``q``, ``[batch, num_qo_heads, head_dim]`` with contiguous channels.

    Returns
    -------
    tables
        int64 ``[batch, num_kv_heads, packs, 5 * head_dim]``: the query words, then the sum table.
    scales
        float32 ``[batch, num_kv_heads, packs, 2, 4]``: what one unit of a member's sums and of its query words is
        worth.
    """
    batch, num_qo_heads, head_dim = q.shape
    group = num_qo_heads // num_kv_heads
    packs = num_packs(group)
    tables = torch.empty(batch, num_kv_heads, packs, 5 * head_dim, dtype=torch.int64, device=q.device)
    scales = torch.empty(batch, num_kv_heads, packs, 2, PACK, dtype=torch.float32, device=q.device)
    if batch:
        _prepare_queries[(batch, num_kv_heads, packs)](
            q,
            q.stride(0),
            q.stride(1),
            tables,
            scales,
            NUM_KV_HEADS=num_kv_heads,
            GROUP=group,
            PACKS=packs,
            HEAD_DIM=head_dim,
            TABLE_WORDS=5 * head_dim,
        )
    return tables, scales
