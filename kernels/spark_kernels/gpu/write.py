"""New tokens to rows in one launch: codes and kept channels of keys, encoding of values.

A program is a warp that has some tokens' keys and values of one KV head each, see `spark_kernels.gpu.lanes`, and keeps
everything in registers. In extend a small kernel before it sums up each request's observation window.

The arithmetic follows `spark_kernels.reference` operation by operation, so these kernels are compiled without fused
multiplications and with correctly rounded divisions and square roots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_kernels.formats import Pruned
from spark_kernels.gpu.lanes import FEW_CHANNELS, MANY_CHANNELS, WARP, gather_channels, load_channels
from spark_kernels.gpu.pack import finite, store_keys
from spark_kernels.gpu.rows import PrunedLayout, check_head_dim, key_rows
from spark_kernels.gpu.values import store_values, written_values
from spark_kernels.rows import LayerRows


@triton.jit(do_not_specialize=["window"], do_not_specialize_on_alignment=["qo_indptr_ptr"])
def _window_squares(
    q_ptr,
    q_stride_token,
    q_stride_head,
    qo_indptr_ptr,
    order_ptr,
    squares_ptr,
    window,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """One program per (request, KV head); squares are stored by position."""
    request = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    positions = tl.arange(0, HEAD_DIM)
    channels = tl.load(order_ptr + head * HEAD_DIM + positions)
    start = tl.load(qo_indptr_ptr + request).to(tl.int64)
    stop = tl.load(qo_indptr_ptr + request + 1).to(tl.int64)
    total = tl.zeros([HEAD_DIM], tl.float32)
    for token in range(tl.maximum(start, stop - window), stop):
        for member in range(GROUP):
            q = tl.load(q_ptr + token * q_stride_token + (head * GROUP + member) * q_stride_head + channels)
            total += q.to(tl.float32) * q.to(tl.float32)
    tl.store(squares_ptr + (request * NUM_KV_HEADS + head) * HEAD_DIM + positions, finite(total))


@triton.jit
def _own_squares(q_ptr, q_stride_head, channels, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """Squares over one token's queries of a KV head, of a lane's ``channels``; they are added in order."""
    totals = ()
    for member in tl.static_range(GROUP):
        q = gather_channels(q_ptr + member * q_stride_head, channels, CHANNELS)
        sums = ()
        for i in tl.static_range(CHANNELS):
            square = q[i] * q[i]
            sums = sums + (square if member == 0 else totals[i] + square,)
        totals = sums
    squares = ()
    for i in tl.static_range(CHANNELS):
        squares = squares + (finite(totals[i]),)
    return squares


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots_ptr", "squares_of_ptr"])
def _write_rows(
    q_ptr,
    q_stride_token,
    q_stride_head,
    k_ptr,
    k_stride_token,
    k_stride_head,
    v_ptr,
    v_stride_token,
    v_stride_head,
    slots_ptr,
    squares_ptr,
    squares_of_ptr,
    order_ptr,
    centre_ptr,
    inverse_step_ptr,
    unit_ptr,
    inverse_unit_ptr,
    keys_ptr,
    values_ptr,
    v_scale,
    num_rows,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    LAYOUT: tl.constexpr,
    V_LAYOUT: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
    V_SCALED: tl.constexpr,
    V_LIMIT: tl.constexpr,
    V_FORWARD: tl.constexpr,
    V_UNIT_STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``ROWS`` of the ``num_rows`` (token, KV head); ``LAYOUT`` is None for keys that are numbers.

    For values see `written_values`. What is left over in the last program writes the last row again.
    """
    number = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), num_rows - 1)[:, None]
    token = (number // NUM_KV_HEADS).to(tl.int64)
    head = number % NUM_KV_HEADS
    rows = tl.load(slots_ptr + token).to(tl.int64) * NUM_KV_HEADS + head
    v = v_ptr + token * v_stride_token + head * v_stride_head
    store_values(
        v, v_scale, values_ptr, rows, V_HEAD_DIM, V_LAYOUT, V_SCALED, V_LIMIT, V_FORWARD, V_UNIT_STEP, CHANNELS
    )

    k = k_ptr + token * k_stride_token + head * k_stride_head
    if LAYOUT is None:
        channels = tl.arange(0, HEAD_DIM)[None, :]
        tl.store(keys_ptr + rows * HEAD_DIM + channels, tl.load(k + channels).to(keys_ptr.dtype.element_ty))
    else:
        positions = CHANNELS * tl.arange(0, HEAD_DIM // CHANNELS)[None, :]
        if HAS_SQUARES:
            request = tl.load(squares_of_ptr + token).to(tl.int64)
            at = (request * NUM_KV_HEADS + head) * HEAD_DIM + positions
            squares = load_channels(squares_ptr + at, CHANNELS)
        else:
            q = q_ptr + token * q_stride_token + head * GROUP * q_stride_head
            channels = load_channels(order_ptr + head * HEAD_DIM + positions, CHANNELS)
            squares = _own_squares(q, q_stride_head, channels, GROUP, CHANNELS)
        tables = (order_ptr, centre_ptr, inverse_step_ptr, unit_ptr, inverse_unit_ptr)
        store_keys(k, squares, tables, head, keys_ptr + rows * LAYOUT.row_bytes, LAYOUT, CHANNELS)


def write_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    rows: LayerRows,
    *,
    qo_indptr: torch.Tensor | None,
    window: int,
    v_scale: float,
) -> None:
    """See `spark_kernels.reference.write_rows`; nothing is read on the host."""
    num_tokens, num_kv_heads, head_dim = k.shape
    key_format = rows.key_format
    check_head_dim(head_dim)
    check_head_dim(rows.value_format.head_dim)
    if num_tokens == 0:
        return
    q, k, v = (x if _is_read_by_words(x) else x.contiguous() for x in (q, k, v))
    group = q.shape[1] // num_kv_heads
    is_pruned = isinstance(key_format, Pruned)
    # What keys that are numbers do not need is not read.
    squares = squares_of = q
    tables = (q,) * 5
    if is_pruned:
        restoration = rows.restoration
        tables = (
            restoration.order,
            restoration.centre,
            restoration.inverse_step,
            restoration.unit,
            restoration.inverse_unit,
        )
        if qo_indptr is not None:
            squares, squares_of = window_squares(q, num_kv_heads, qo_indptr, window, restoration.order)
    values, value_arguments = written_values(rows, v, v_scale)
    num_rows = num_tokens * num_kv_heads
    share = lanes_share(head_dim, is_decode=qo_indptr is None)
    _write_rows[(triton.cdiv(num_rows, share["ROWS"]),)](
        q,
        q.stride(0),
        q.stride(1),
        k,
        k.stride(0),
        k.stride(1),
        v,
        v.stride(0),
        v.stride(1),
        slots,
        squares,
        squares_of,
        *tables,
        key_rows(rows),
        values,
        v_scale,
        num_rows,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        LAYOUT=PrunedLayout.of(key_format),
        HAS_SQUARES=is_pruned and qo_indptr is not None,
        **value_arguments,
        **share,
        num_warps=1,
        enable_fp_fusion=False,
    )


def lanes_share(head_dim: int, *, is_decode: bool) -> dict[str, int]:
    """Compile-time arguments for how a warp shares out rows.

    A prefill has rows enough to fill a GPU, so that instructions per row count; a decode step waits for its few rows.
    """
    channels = FEW_CHANNELS if is_decode else MANY_CHANNELS
    return {"CHANNELS": channels, "ROWS": WARP * channels // head_dim}


def _is_read_by_words(x: torch.Tensor) -> bool:
    """Whether heads of ``x``, ``[num_tokens, heads, head_dim]``, are contiguous and begin at multiples of 8 bytes."""
    strides = (x.stride(0), x.stride(1))
    return x.stride(2) == 1 and not any(n * x.element_size() % 8 for n in strides) and x.data_ptr() % 8 == 0


def window_squares(
    q: torch.Tensor, num_kv_heads: int, qo_indptr: torch.Tensor, window: int, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query squares of each request by position, float32 ``[num_requests, num_kv_heads, head_dim]``.

    And each token's request.
    """
    num_tokens, num_qo_heads, head_dim = q.shape
    num_requests = qo_indptr.shape[0] - 1
    squares = torch.empty(num_requests, num_kv_heads, head_dim, dtype=torch.float32, device=q.device)
    _window_squares[(num_requests, num_kv_heads)](
        q,
        q.stride(0),
        q.stride(1),
        qo_indptr,
        order,
        squares,
        window,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_qo_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        num_warps=1,
        enable_fp_fusion=False,
    )
    tokens = torch.arange(num_tokens, dtype=qo_indptr.dtype, device=q.device)
    return squares, torch.searchsorted(qo_indptr[1:].contiguous(), tokens, right=True, out_int32=True)
