"""Attention of new chunks: exact over themselves, over restored segments of their prefixes, merged by lse."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from spark_kernels.formats import Integers
from spark_kernels.gpu.dense import RaggedBatch, pieces
from spark_kernels.gpu.dense_flashinfer import Wrappers
from spark_kernels.gpu.merge import merge_state
from spark_kernels.gpu.restore import restore_keys, restore_values
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
    """One extend step: its chunks, and its prefixes cut into segments with no regard to where requests begin."""

    chunks: RaggedBatch
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
        segments = []
        for start in range(0, prefixes[-1], segment_tokens):
            stop = min(start + segment_tokens, prefixes[-1])
            first, last, parts = pieces(prefixes, start, stop)
            queries = [bound - chunks[first] for bound in chunks[first : last + 1]]
            batch = RaggedBatch(queries, parts, False, device, wrappers, 1 + len(segments))
            segments.append(Segment(prefix_indices[start:stop], slice(chunks[first], chunks[last]), batch))
        return cls(RaggedBatch(chunks, chunks, causal, device, wrappers, 0), segments, wrappers)


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
    chunk = plan.chunks.attend(q, k, v, **arguments)
    if not plan.segments:
        return chunk
    prefix_out = torch.zeros(chunk[0].shape, dtype=torch.float32, device=q.device)
    prefix_lse = torch.full(chunk[1].shape, -math.inf, device=q.device)
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
    return merge_state(*chunk, prefix_out, prefix_lse, back)
