"""Attention of new chunks: exact over themselves, over restored segments of their prefixes, merged by lse.

Short chunks read the rows of their prefixes instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from spark_kernels.formats import Integers
from spark_kernels.gpu.dense import RaggedBatch, pieces
from spark_kernels.gpu.dense_flashinfer import Wrappers
from spark_kernels.gpu.merge import merge_state
from spark_kernels.gpu.restore import restore_keys, restore_values
from spark_kernels.gpu.short_chunks import ShortChunks
from spark_kernels.reference import hadamard_scales
from spark_kernels.rows import LayerRows

# Prefix tokens restored at a time if not said otherwise: 64 MB of bfloat16 keys and values at 8 KV heads of 128.
SEGMENT_TOKENS = 16384
_FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Segment:
    """A stretch of all prefixes end to end, and the queries of the requests that have a part in it.

    Parameters
    ----------
    slots
        int32 or int64, of the stretch's tokens.
    queries
        Those requests' new tokens.
    batch
        The same requests' queries over their parts.
    """

    slots: torch.Tensor
    queries: slice
    batch: RaggedBatch


@dataclass(frozen=True)
class ExtendPlan:
    """One extend step: its chunks, those of them that are short, and the prefixes of the others.

    These are cut into segments with no regard to where requests begin.
    """

    chunks: RaggedBatch
    short: ShortChunks
    segments: list[Segment]
    wrappers: Wrappers

    @classmethod
    def build(
        cls,
        qo_indptr: torch.Tensor,
        prefix_indptr: torch.Tensor,
        prefix_indices: torch.Tensor,
        causal: bool,
        segment_tokens: int,
        previous: ExtendPlan | None = None,
    ) -> ExtendPlan:
        """A plan for chunks and prefixes at host tensors ``qo_indptr`` and ``prefix_indptr``.

        ``previous`` is a plan that will not be run again, whose buffers this one takes over.
        """
        chunks, prefixes = qo_indptr.tolist(), prefix_indptr.tolist()
        device = prefix_indices.device
        wrappers = previous.wrappers if previous else Wrappers()
        short = ShortChunks(chunks, prefixes, prefix_indices)
        if short:
            prefixes, prefix_indices = _without(short.requests, prefixes, prefix_indices)
        segments = []
        for start in range(0, prefixes[-1], segment_tokens):
            stop = min(start + segment_tokens, prefixes[-1])
            first, last, parts = pieces(prefixes, start, stop)
            queries = [bound - chunks[first] for bound in chunks[first : last + 1]]
            batch = RaggedBatch(queries, parts, False, device, wrappers, 1 + len(segments))
            segments.append(Segment(prefix_indices[start:stop], slice(chunks[first], chunks[last]), batch))
        return cls(RaggedBatch(chunks, chunks, causal, device, wrappers, 0), short, segments, wrappers)


def _without(requests: set[int], prefixes: list[int], prefix_indices: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """The prefixes with those of ``requests`` left out, and where they then begin and end."""
    bounds, kept = [0], []
    for request, (start, stop) in enumerate(pairwise(prefixes)):
        if request not in requests and start < stop:
            kept.append(prefix_indices[start:stop])
        bounds.append(bounds[-1] + (0 if request in requests else stop - start))
    return bounds, torch.cat(kept) if kept else prefix_indices[:0]


def extend_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: LayerRows,
    plan: ExtendPlan,
    *,
    sm_scale: float,
    logits_soft_cap: float,
    v_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `spark_kernels.reference.extend_attention`; products are in the dtype of ``q``, merging is in float32.

    Values of integers stay transformed until their prefix's output is merged with that of the chunk.
    """
    arguments = {"sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap}
    out, lse = plan.chunks.attend(q, k, v, **arguments)
    if plan.segments:
        out, lse = _merge_segments(out, lse, q, rows, plan, v_scale, **arguments)
    if plan.short:
        out = out.float()
        plan.short.merge_into(out, lse, q, rows, v_scale=v_scale, **arguments)
    return out, lse


def _merge_segments(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    rows: LayerRows,
    plan: ExtendPlan,
    v_scale: float,
    **arguments: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 output and lse over chunks and segments, from those over the chunks."""
    prefix_out = torch.zeros(out.shape, dtype=torch.float32, device=q.device)
    prefix_lse = torch.full(lse.shape, -math.inf, device=q.device)
    for number, segment in enumerate(plan.segments):
        keys = restore_keys(rows, segment.slots, q.dtype)
        values = restore_values(rows, segment.slots, v_scale, q.dtype, transformed=True)
        if q.dtype == torch.float16:
            # Rounding may bring a restored number beyond what float16 holds.
            keys.clamp_(-_FLOAT16_MAX, _FLOAT16_MAX)
            values.clamp_(-_FLOAT16_MAX, _FLOAT16_MAX)
        part = segment.queries
        if part.start < part.stop:
            state = segment.batch.attend(q[part], keys, values, **arguments)
            if number:
                state = merge_state(prefix_out[part], prefix_lse[part], *state)
            prefix_out[part], prefix_lse[part] = state
    made = rows.value_format
    back = hadamard_scales(made.block)[1] if isinstance(made, Integers) else 0.0
    return merge_state(out, lse, prefix_out, prefix_lse, back)
