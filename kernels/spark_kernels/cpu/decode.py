"""Fused decode attention over rows: one query per request, no dense copy of the keys.

Work is cut into (request, chunk of KV_CHUNK tokens, KV head); each item restores a block of rows into a tile that
stays in the L1 cache, scores it against the group's queries and accumulates values with an online softmax. Chunks are
counted from the start of each request and merged in order, so a request's result does not depend on the batch it is
in or on the number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numba import prange

from spark_kernels.cpu import vectors
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.numbers import FAST_SUMS, LN2, LOG2_E, exp2_nonpositive
from spark_kernels.cpu.rows import key_layout, load_keys, load_numbers, value_layout
from spark_kernels.cpu.threads import call_parallel
from spark_kernels.record import LayerRows

KV_CHUNK = 256
_BLOCK = vectors.LANES
_CACHE_LINE = 64


@dataclass(frozen=True)
class DecodePlan:
    """Work items of one decode step.

    ``item_request``, ``item_start`` and ``item_stop`` give each chunk's request and its range in ``kv_indices``;
    the chunks of request r are ``request_items[r] .. request_items[r + 1] - 1``.
    """

    kv_indices: np.ndarray
    item_request: np.ndarray
    item_start: np.ndarray
    item_stop: np.ndarray
    request_items: np.ndarray

    @classmethod
    def build(cls, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, num_kv_heads: int) -> DecodePlan:
        """Chunks of a fixed length; the number of KV heads does not matter."""
        bounds = kv_indptr.to("cpu", torch.int64).numpy()
        chunks = -(-np.diff(bounds) // KV_CHUNK)
        request_items = np.concatenate([[0], np.cumsum(chunks)])
        item_request = np.repeat(np.arange(chunks.shape[0]), chunks)
        within = np.arange(item_request.shape[0]) - request_items[item_request]
        item_start = bounds[item_request] + within * KV_CHUNK
        return cls(
            kv_indices=kv_indices.to("cpu", torch.int64).contiguous().numpy(),
            item_request=item_request,
            item_start=item_start,
            item_stop=np.minimum(item_start + KV_CHUNK, bounds[item_request + 1]),
            request_items=request_items,
        )


@kernel()
def _score(q, tile, count, scores):
    """Products of the group's queries with the first ``count`` rows of a tile.

    Four queries and two rows at a time stay in registers. Where their number is not a multiple of that, the last one
    is computed more than once, to the same result.
    """
    zero = vectors.splat(np.float32(0.0))
    last = q.shape[0] - 1
    for m0 in range(0, q.shape[0], 4):
        m1, m2, m3 = min(m0 + 1, last), min(m0 + 2, last), min(m0 + 3, last)
        for n in range(0, count, 2):
            next_n = min(n + 1, count - 1)
            a0, a1, a2, a3 = zero, zero, zero, zero
            b0, b1, b2, b3 = zero, zero, zero, zero
            for j in range(0, q.shape[1], vectors.LANES):
                a, b = vectors.load(tile, n, j), vectors.load(tile, next_n, j)
                query = vectors.load(q, m0, j)
                a0, b0 = vectors.multiply_add(query, a, a0), vectors.multiply_add(query, b, b0)
                query = vectors.load(q, m1, j)
                a1, b1 = vectors.multiply_add(query, a, a1), vectors.multiply_add(query, b, b1)
                query = vectors.load(q, m2, j)
                a2, b2 = vectors.multiply_add(query, a, a2), vectors.multiply_add(query, b, b2)
                query = vectors.load(q, m3, j)
                a3, b3 = vectors.multiply_add(query, a, a3), vectors.multiply_add(query, b, b3)
            scores[m0, n], scores[m0, next_n] = vectors.total(a0), vectors.total(b0)
            scores[m1, n], scores[m1, next_n] = vectors.total(a1), vectors.total(b1)
            scores[m2, n], scores[m2, next_n] = vectors.total(a2), vectors.total(b2)
            scores[m3, n], scores[m3, next_n] = vectors.total(a3), vectors.total(b3)


@kernel()
def _accumulate(weights, tile, count, acc):
    """Add the weighted sums of the first ``count`` rows of a tile to ``acc``; four queries at a time, as above."""
    last = acc.shape[0] - 1
    for m0 in range(0, acc.shape[0], 4):
        m1, m2, m3 = min(m0 + 1, last), min(m0 + 2, last), min(m0 + 3, last)
        for j in range(0, acc.shape[1], vectors.LANES):
            a0, a1 = vectors.load(acc, m0, j), vectors.load(acc, m1, j)
            a2, a3 = vectors.load(acc, m2, j), vectors.load(acc, m3, j)
            for n in range(count):
                values = vectors.load(tile, n, j)
                a0 = vectors.multiply_add(vectors.splat(weights[m0, n]), values, a0)
                a1 = vectors.multiply_add(vectors.splat(weights[m1, n]), values, a1)
                a2 = vectors.multiply_add(vectors.splat(weights[m2, n]), values, a2)
                a3 = vectors.multiply_add(vectors.splat(weights[m3, n]), values, a3)
            vectors.store(acc, m0, j, a0)
            vectors.store(acc, m1, j, a1)
            vectors.store(acc, m2, j, a2)
            vectors.store(acc, m3, j, a3)


@kernel(fastmath=FAST_SUMS)
def _soften(scores, count, score_scale, soft_cap, acc, peak, total):
    """Turn a block's scores into softmax weights relative to the running ``peak``, rescaling what came before."""
    for member in range(scores.shape[0]):
        for n in range(count):
            scores[member, n] *= score_scale
        if soft_cap > 0:
            for n in range(count):
                scores[member, n] = soft_cap * np.float32(math.tanh(scores[member, n]))
        for n in range(count, _BLOCK):
            scores[member, n] = -np.inf
        block_peak = vectors.largest(vectors.load(scores, member, 0))
        if block_peak > peak[member]:
            rescale = exp2_nonpositive(peak[member] - block_peak)
            peak[member] = block_peak
            total[member] *= rescale
            for j in range(acc.shape[1]):
                acc[member, j] *= rescale
        block_total = np.float32(0.0)
        for n in range(count):
            weight = exp2_nonpositive(scores[member, n] - peak[member])
            scores[member, n] = weight
            block_total += weight
        total[member] += block_total


@kernel()
def _prefetch(rows, slots, first, head):
    """Ask for the rows of the next block: slots are scattered, so the CPU cannot foresee them."""
    for n in range(first, min(first + _BLOCK, slots.shape[0])):
        for byte in range(0, rows.shape[2], _CACHE_LINE):
            vectors.prefetch(rows, slots[n], head, byte)


@kernel()
def _attend(q, key_rows, layout, value_rows, value_code, slots, head, score_scale, soft_cap, acc, peak, total):
    """Online softmax of the group's queries over one chunk.

    Scores are in base 2. Fills ``acc`` with the weighted sum of values relative to ``peak``, the largest score, and
    ``total`` with the sum of weights.
    """
    key_tile = vectors.empty_tile(_BLOCK, q.shape[1])
    value_tile = vectors.empty_tile(_BLOCK, acc.shape[1])
    scores = vectors.empty_tile(q.shape[0], _BLOCK)
    acc[:] = np.float32(0.0)
    peak[:] = np.float32(-np.inf)
    total[:] = np.float32(0.0)
    for first in range(0, slots.shape[0], _BLOCK):
        count = min(_BLOCK, slots.shape[0] - first)
        _prefetch(key_rows, slots, first + _BLOCK, head)
        _prefetch(value_rows, slots, first + _BLOCK, head)
        load_keys(layout, key_rows, slots, first, count, head, key_tile, 0)
        load_numbers(value_code, value_rows, slots, first, count, head, value_tile, 0)
        _score(q, key_tile, count, scores)
        _soften(scores, count, score_scale, soft_cap, acc, peak, total)
        _accumulate(scores, value_tile, count, acc)


@kernel(fastmath=FAST_SUMS)
def _merge(accs, peaks, totals, member, v_scale, out):
    """Combine one query's chunks into ``out``; returns the natural-log lse."""
    out[:] = np.float32(0.0)
    if accs.shape[0] == 0:
        return np.float32(-np.inf)
    peak = peaks[0, member]
    for i in range(1, accs.shape[0]):
        peak = max(peak, peaks[i, member])
    total = np.float32(0.0)
    for i in range(accs.shape[0]):
        weight = exp2_nonpositive(peaks[i, member] - peak)
        total += weight * totals[i, member]
        for j in range(out.shape[0]):
            out[j] += weight * accs[i, member, j]
    for j in range(out.shape[0]):
        out[j] *= v_scale / total
    return peak * LN2 + np.log(total)


@kernel(parallel=True)
def _decode(
    q,
    key_rows,
    layout,
    value_rows,
    value_code,
    kv_indices,
    item_request,
    item_start,
    item_stop,
    request_items,
    score_scale,
    soft_cap,
    v_scale,
    out,
    lse,
):
    items = item_request.shape[0]
    heads = key_rows.shape[1]
    group = q.shape[1] // heads
    accs = np.empty((heads, items, group, out.shape[2]), np.float32)
    peaks = np.empty((heads, items, group), np.float32)
    totals = np.empty((heads, items, group), np.float32)
    for work in prange(items * heads):
        item = work // heads
        head = work % heads
        _attend(
            q[item_request[item], head * group : (head + 1) * group],
            key_rows,
            layout,
            value_rows,
            value_code,
            kv_indices[item_start[item] : item_stop[item]],
            head,
            score_scale,
            soft_cap,
            accs[head, item],
            peaks[head, item],
            totals[head, item],
        )
    for work in prange(q.shape[0] * q.shape[1]):
        request = work // q.shape[1]
        qo_head = work % q.shape[1]
        head = qo_head // group
        first, last = request_items[request], request_items[request + 1]
        lse[request, qo_head] = _merge(
            accs[head, first:last],
            peaks[head, first:last],
            totals[head, first:last],
            qo_head % group,
            v_scale,
            out[request, qo_head],
        )


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
    out = torch.empty(*q.shape[:2], rows.value_format.head_dim)
    lse = torch.empty(q.shape[:2])
    # Scores come out in base 2; the soft cap takes its argument in units of the cap.
    scale, cap = sm_scale * LOG2_E, 0.0
    if logits_soft_cap > 0:
        scale, cap = sm_scale / logits_soft_cap, logits_soft_cap * LOG2_E
    call_parallel(
        _decode,
        q.float().contiguous().numpy(),
        rows.keys.numpy(),
        key_layout(rows.key_format),
        rows.values.numpy(),
        value_layout(rows.value_format),
        plan.kv_indices,
        plan.item_request,
        plan.item_start,
        plan.item_stop,
        plan.request_items,
        np.float32(scale),
        np.float32(cap),
        np.float32(v_scale),
        out.numpy(),
        lse.numpy(),
    )
    return out, lse
