"""Queries in the form the decode kernel takes them: once per layer call, before any token is read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_kernels.gpu.rows import PrunedLayout
from spark_kernels.rows import LayerRows

# Fewer columns make no tensor-core product.
LEAST_COLUMNS = 8


@triton.jit
def _power_of_two_above(x):
    """The power of two in (x, 2x] for a normal float32 x, from its exponent bits."""
    return ((x.to(tl.int32, bitcast=True) & 0x7F800000) + 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def _as_halves(x):
    """``[head_dim, columns]`` as float16 of columns divided by powers of two; and these."""
    scale = _power_of_two_above(tl.maximum(tl.max(tl.abs(x), 0), 1e-30))
    return (x / scale[None, :]).to(tl.float16), scale


@triton.jit
def _prepare_queries(
    q_ptr,
    q_stride_token,
    q_stride_head,
    order_ptr,
    centre_ptr,
    unit_ptr,
    tables_ptr,
    scalars_ptr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """One program per (request, KV head)."""
    D: tl.constexpr = LAYOUT.head_dim
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    positions = tl.arange(0, D)
    columns = tl.arange(0, COLUMNS)
    order = tl.load(order_ptr + head * D + positions)
    centre = tl.load(centre_ptr + head * D + positions)
    unit = tl.load(unit_ptr + head * D + positions)
    narrow = tl.where(positions < LAYOUT.count_4 + LAYOUT.count_2, -1.5, -0.5)
    middle = tl.where(positions < LAYOUT.count_4, -7.5, narrow)
    q_row = q_ptr + request * q_stride_token + (head * GROUP + columns[None, :]) * q_stride_head
    q = tl.load(q_row + order[:, None], mask=columns[None, :] < GROUP, other=0.0).to(tl.float32)
    # NaN if any channel is not finite, which float16 below might hide.
    poison = tl.sum(q * 0.0, 0)
    of_codes = q * unit[:, None]
    of_centre = tl.sum(q * centre[:, None], 0) + poison
    of_middles = tl.sum(of_codes * middle[:, None], 0)
    code_table, code_scale = _as_halves(of_codes)
    kept_table, kept_scale = _as_halves(q)

    index = request * NUM_KV_HEADS + head
    entries = positions[:, None] * COLUMNS + columns[None, :]
    tl.store(tables_ptr + index * (2 * D * COLUMNS) + entries, code_table)
    tl.store(tables_ptr + index * (2 * D * COLUMNS) + D * COLUMNS + entries, kept_table)
    scalars = scalars_ptr + index * (4 * COLUMNS) + columns
    tl.store(scalars, code_scale)
    tl.store(scalars + COLUMNS, kept_scale)
    tl.store(scalars + 2 * COLUMNS, of_middles)
    tl.store(scalars + 3 * COLUMNS, of_centre)


def num_columns(group: int) -> int:
    """Queries of a GQA group, and columns of zeros after them."""
    return max(LEAST_COLUMNS, triton.next_power_of_2(group))


def prepare_queries(q: torch.Tensor, rows: LayerRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries by position, and what of a score does not depend on the token.

    Parameters
    ----------
    q
        ``[batch, num_qo_heads, head_dim]`` with contiguous channels.
    rows
        The layer, with pruned keys.

    Returns
    -------
    tables
        float16 ``[batch, num_kv_heads, 2, head_dim, columns]``: queries times units, and queries, each divided by a
        power of two.
    scalars
        float32 ``[batch, num_kv_heads, 4, columns]``: those powers of two, and the products with the middles of all
        levels and with the centre.
    """
    batch, num_qo_heads, head_dim = q.shape
    group = num_qo_heads // rows.num_kv_heads
    columns = num_columns(group)
    tables = torch.empty(batch, rows.num_kv_heads, 2, head_dim, columns, dtype=torch.float16, device=q.device)
    scalars = torch.empty(batch, rows.num_kv_heads, 4, columns, dtype=torch.float32, device=q.device)
    if batch:
        _prepare_queries[(batch, rows.num_kv_heads)](
            q,
            q.stride(0),
            q.stride(1),
            rows.restoration.order,
            rows.restoration.centre,
            rows.restoration.unit,
            tables,
            scalars,
            NUM_KV_HEADS=rows.num_kv_heads,
            GROUP=group,
            COLUMNS=columns,
            LAYOUT=PrunedLayout.of(rows.key_format),
        )
    return tables, scalars
