"""Fused decode attention over rows: one query per request, no dense copy of the keys.

Work is cut into (request, chunk of KV_CHUNK tokens, KV head); each item scores its chunk's keys against the group's
queries, takes the softmax and sums values under it. Values of integers are transformed back once per query, when its
chunks are merged. Chunks are counted from the start of each request and merged in
order, so a request's result does not depend on the batch it is in or on the number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numba import prange

from spark_kernels.cpu import memory, vectors
from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.fields import key_layout, value_layout
from spark_kernels.cpu.hadamard import transform
from spark_kernels.cpu.numbers import FAST_SUMS, LN2, LOG2_E, exp2_nonpositive
from spark_kernels.cpu.scores import QUAD, score_keys
from spark_kernels.cpu.threads import call_parallel
from spark_kernels.cpu.vector_types import LANES
from spark_kernels.cpu.weighted_sums import weighted_sum
from spark_kernels.formats import Integers
from spark_kernels.reference import hadamard_scales
from spark_kernels.rows import LayerRows

KV_CHUNK = 256
# Partial results, one per chunk and query head, that one thread merges.
_SERIAL_MERGES = 256


@dataclass(frozen=True)
class DecodePlan:
    """Work items of one decode step.

    Parameters
    ----------
    kv_indices
        int64 ``[total_tokens]``.
    items
        int64 ``[num_items, 3]``: each chunk's request and its range in ``kv_indices``.
    request_items
        int64 ``[batch + 1]``: the chunks of request r are ``items[request_items[r] : request_items[r + 1]]``.
    """

    kv_indices: np.ndarray
    items: np.ndarray
    request_items: np.ndarray
    _buffers: dict[tuple[int, ...], Buffers] = field(default_factory=dict)

    @classmethod
    def build(cls, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, num_kv_heads: int) -> DecodePlan:
        """Chunks of a fixed length; the number of KV heads does not matter."""
        bounds = kv_indptr.to("cpu", torch.int64).numpy()
        chunks = -(-np.diff(bounds) // KV_CHUNK)
        request_items = np.concatenate([[0], np.cumsum(chunks)])
        request = np.repeat(np.arange(chunks.shape[0]), chunks)
        start = bounds[request] + (np.arange(request.shape[0]) - request_items[request]) * KV_CHUNK
        stop = np.minimum(start + KV_CHUNK, bounds[request + 1])
        kv_indices = kv_indices.to("cpu", torch.int64).contiguous().numpy()
        return cls(kv_indices, np.stack([request, start, stop], axis=1), request_items)

    def buffers(self, batch: int, num_qo_heads: int, head_dim: int, v_head_dim: int) -> Buffers:
        """The same buffers for all layers of a shape."""
        shape = (batch, num_qo_heads, head_dim, v_head_dim)
        if shape not in self._buffers:
            self._buffers[shape] = Buffers.allocate(*shape)
        return self._buffers[shape]


class Buffers(NamedTuple):
    """float32 queries, output and lse of a layer, as tensors and in NumPy's terms.

    Kept between layers: to allocate and wrap them takes longer than the attention of a short context.
    """

    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray]

    @classmethod
    def allocate(cls, batch: int, num_qo_heads: int, head_dim: int, v_head_dim: int) -> Buffers:
        q, out = (torch.empty(batch, num_qo_heads, channels) for channels in (head_dim, v_head_dim))
        lse = torch.empty(batch, num_qo_heads)
        return cls(q, out, lse, (q.numpy(), out.numpy(), lse.numpy()))


@kernel()
def _soften(scores, count, score_scale, soft_cap, peaks, totals):
    """Turn a chunk's scores into softmax weights relative to the largest, those of four queries and tokens at a time.

    ``peaks`` and ``totals`` get each query's largest score and sum of weights, four to a row.
    """
    scale = vectors.splat(score_scale)
    lowest = np.float32(-np.inf)
    for quad in range(scores.shape[0]):
        stop = -(-QUAD * count // LANES) * LANES
        for i in range(0, stop, LANES):
            memory.store(scores, quad, i, vectors.multiply(scale, memory.load(scores, quad, i)))
        if soft_cap > 0:
            for i in range(QUAD * count):
                scores[quad, i] = soft_cap * np.float32(math.tanh(scores[quad, i]))
        scores[quad, QUAD * count : stop] = lowest
        peak = vectors.splat(lowest)
        for i in range(0, stop, LANES):
            peak = vectors.larger(peak, memory.load(scores, quad, i))
        peak = vectors.column_largest(peak)
        total = vectors.splat(np.float32(0.0))
        for i in range(0, stop, LANES):
            weight = vectors.exp2_nonpositive(vectors.subtract(memory.load(scores, quad, i), peak))
            memory.store(scores, quad, i, weight)
            total = vectors.add(total, weight)
        memory.store(peaks, quad, 0, vectors.first_four(peak))
        memory.store(totals, quad, 0, vectors.first_four(vectors.column_totals(total)))


@kernel()
def _attend(q, key_rows, layout, value_rows, value_layout, slots, head, score_scale, soft_cap, acc, peaks, totals):
    """Softmax of the group's queries over one chunk.

    Scores are in base 2. Fills ``acc`` with the sums of values weighted relative to the largest scores; ``peaks`` and
    ``totals`` as `_soften` does.
    """
    scores = memory.empty_tile(peaks.shape[0], QUAD * KV_CHUNK)
    score_keys(layout, key_rows, slots, head, q, scores, value_rows)
    _soften(scores, slots.shape[0], score_scale, soft_cap, peaks, totals)
    weighted_sum(value_layout, value_rows, slots, head, scores, acc)


@kernel(fastmath=FAST_SUMS)
def _merge(accs, peaks, totals, member, v_scale, out):
    """Combine one query's chunks into ``out``; returns the natural-log lse."""
    out[:] = np.float32(0.0)
    if accs.shape[0] == 0:
        return np.float32(-np.inf)
    quad, lane = member // QUAD, member % QUAD
    peak = peaks[0, quad, lane]
    for i in range(1, accs.shape[0]):
        peak = max(peak, peaks[i, quad, lane])
    total = np.float32(0.0)
    for i in range(accs.shape[0]):
        weight = exp2_nonpositive(peaks[i, quad, lane] - peak)
        total += weight * totals[i, quad, lane]
        for j in range(out.shape[0]):
            out[j] += weight * accs[i, member, j]
    for j in range(out.shape[0]):
        out[j] *= v_scale / total
    return peak * LN2 + np.log(total)


@kernel()
def _merge_output(work, accs, peaks, totals, request_items, value_layout, back, v_scale, out, lse):
    request = work // lse.shape[1]
    qo_head = work % lse.shape[1]
    group = lse.shape[1] // accs.shape[0]
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
    if back > 0:
        transform(out[request], qo_head, value_layout.block)
        for j in range(out.shape[2]):
            out[request, qo_head, j] *= back


@kernel(parallel=True)
def _decode(
    q,
    key_rows,
    layout,
    value_rows,
    value_layout,
    back,
    kv_indices,
    items,
    request_items,
    score_scale,
    soft_cap,
    v_scale,
    out,
    lse,
):
    num_items = items.shape[0]
    heads = key_rows.shape[1]
    group = q.shape[1] // heads
    quads = -(-group // QUAD)
    accs = np.empty((heads, num_items, QUAD * quads, out.shape[2]), np.float32)
    peaks = np.empty((heads, num_items, quads, QUAD), np.float32)
    totals = np.empty((heads, num_items, quads, QUAD), np.float32)
    for work in prange(num_items * heads):
        item = work // heads
        head = work % heads
        _attend(
            q[items[item, 0], head * group : (head + 1) * group],
            key_rows,
            layout,
            value_rows,
            value_layout,
            kv_indices[items[item, 1] : items[item, 2]],
            head,
            score_scale,
            soft_cap,
            accs[head, item],
            peaks[head, item],
            totals[head, item],
        )
    outputs = q.shape[0] * q.shape[1]
    # To start the threads again takes longer than a few merges.
    if num_items * q.shape[1] <= _SERIAL_MERGES:
        for work in range(outputs):
            _merge_output(work, accs, peaks, totals, request_items, value_layout, back, v_scale, out, lse)
    else:
        for work in prange(outputs):
            _merge_output(work, accs, peaks, totals, request_items, value_layout, back, v_scale, out, lse)


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
    buffers = plan.buffers(*q.shape, rows.value_format.head_dim)
    buffers.q.copy_(q)
    q_array, out, lse = buffers.arrays
    key_rows, value_rows = rows.arrays
    # Scores come out in base 2; the soft cap takes its argument in units of the cap.
    scale, cap = sm_scale * LOG2_E, 0.0
    if logits_soft_cap > 0:
        scale, cap = sm_scale / logits_soft_cap, logits_soft_cap * LOG2_E
    call_parallel(
        _decode,
        q_array,
        key_rows,
        key_layout(rows),
        value_rows,
        value_layout(rows.value_format),
        np.float32(hadamard_scales(rows.value_format.block)[1] if isinstance(rows.value_format, Integers) else 0.0),
        plan.kv_indices,
        plan.items,
        plan.request_items,
        np.float32(scale),
        np.float32(cap),
        np.float32(v_scale),
        out,
        lse,
    )
    return buffers.out.to(q.dtype, copy=True), buffers.lse
