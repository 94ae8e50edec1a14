"""How decode attention over a ragged batch is split into programs: planned where the batch is, never on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Programs of the split kernel that an SM runs at once, by their registers: two of heads of 256.
_PROGRAMS_PER_SM = 3
# A plan makes a GPU run so many programs one after another, at most: the more, the smaller the last, partial round.
_WAVES = 4
# Planning tries so many lengths of splits.
_CANDIDATES = 32
# What a split costs by itself, its lookup tables and its partial result, in tokens: 19 to 32 by the warp instructions
# of the default recipe.
_SPLIT_COST = 25
_SHORTEST_SPLIT = 128
# Tokens that the split kernel takes at once.
_SPLIT_STEP = 64
# Kernels that look at all requests of a batch are compiled for this many, and again only for batches beyond.
_BATCH_BLOCK = 256
# Of the planning kernel, which compares each of its splits with every request.
_SPLITS_PER_PROGRAM = 8


@dataclass(frozen=True)
class DecodePlan:
    """Splits of one decode step, for all its layers.

    Their number depends on the size of the batch and not on its lengths, so that a step captured in a CUDA graph can
    be planned again for other lengths; those that a step does not need are empty.

    Parameters
    ----------
    kv_indices
        int32 or int64, the slots of the batch's tokens.
    split_request, split_start, split_stop
        int32 ``[num_splits]``, each split's request and its range in ``kv_indices``; an empty range if not needed.
    request_splits
        int32 ``[batch + 1]``, the splits of request r are ``request_splits[r] .. request_splits[r + 1] - 1``.
    """

    kv_indices: torch.Tensor
    split_request: torch.Tensor
    split_start: torch.Tensor
    split_stop: torch.Tensor
    request_splits: torch.Tensor

    @classmethod
    def build(cls, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, num_kv_heads: int) -> DecodePlan:
        """A plan for the requests at ``kv_indptr``, int32 or int64 ``[batch + 1]`` on the device of ``kv_indices``."""
        batch, device = kv_indptr.shape[0] - 1, kv_indices.device
        num_splits = batch + _most_splits(num_kv_heads, device) if batch else 0
        splits = torch.empty(3, num_splits, dtype=torch.int32, device=device)
        plan = cls(kv_indices, *splits, torch.zeros(batch + 1, dtype=torch.int32, device=device))
        plan.fill(kv_indptr, num_kv_heads)
        return plan

    def fill(self, kv_indptr: torch.Tensor, num_kv_heads: int) -> None:
        """Plan again in place, for as many requests of other lengths."""
        batch, num_splits = self.request_splits.shape[0] - 1, self.split_request.shape[0]
        if batch == 0:
            return
        _plan_splits[(triton.cdiv(num_splits, _SPLITS_PER_PROGRAM),)](
            kv_indptr,
            self.split_request,
            self.split_start,
            self.split_stop,
            self.request_splits,
            batch,
            num_splits,
            _most_splits(num_kv_heads, self.kv_indices.device),
            num_kv_heads,
            _programs_at_once(self.kv_indices.device),
            CANDIDATES=_CANDIDATES,
            SPLIT_COST=_SPLIT_COST,
            SHORTEST_SPLIT=_SHORTEST_SPLIT,
            SPLIT_STEP=_SPLIT_STEP,
            BATCH_BLOCK=batch_block(batch),
            SPLIT_BLOCK=_SPLITS_PER_PROGRAM,
        )


@triton.jit(
    do_not_specialize=["batch", "num_splits", "most_splits", "num_kv_heads", "programs_at_once"],
    do_not_specialize_on_alignment=[
        "kv_indptr_ptr",
        "split_request_ptr",
        "split_start_ptr",
        "split_stop_ptr",
        "request_splits_ptr",
    ],
)
def _plan_splits(
    kv_indptr_ptr,
    split_request_ptr,
    split_start_ptr,
    split_stop_ptr,
    request_splits_ptr,
    batch,
    num_splits,
    most_splits,
    num_kv_heads,
    programs_at_once,
    CANDIDATES: tl.constexpr,
    SPLIT_COST: tl.constexpr,
    SHORTEST_SPLIT: tl.constexpr,
    SPLIT_STEP: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
):
    """One program per block of splits.

    Splits of one length for the whole batch, the one whose programs are expected to end first: a single long request
    is cut into many, and each of many short ones is left whole.
    """
    total = tl.load(kv_indptr_ptr + batch).to(tl.int32)
    requests = tl.arange(0, BATCH_BLOCK)
    exists = requests < batch
    starts = tl.load(kv_indptr_ptr + requests, mask=exists, other=0).to(tl.int32)
    stops = tl.load(kv_indptr_ptr + requests + 1, mask=exists, other=0).to(tl.int32)
    longest = tl.max(stops - starts, 0)
    length, best = total, float("inf")
    for candidate in range(1, CANDIDATES + 1):
        splits_at_most = tl.maximum(most_splits * candidate // CANDIDATES, 1)
        tried = tl.maximum(tl.cdiv(total, splits_at_most * SPLIT_STEP) * SPLIT_STEP, SHORTEST_SPLIT)
        programs = tl.sum(tl.cdiv(stops - starts, tried), 0) * num_kv_heads
        # Two bounds of when the last program ends: all of them as long as the longest, or one more after the average.
        program = (tl.minimum(tried, longest) + SPLIT_COST).to(tl.float32)
        work = total.to(tl.float32) * num_kv_heads + programs.to(tl.float32) * SPLIT_COST
        end = tl.minimum(tl.cdiv(programs, programs_at_once) * program, work / programs_at_once + program)
        length, best = tl.where(end < best, tried, length), tl.minimum(end, best)
    counts = tl.cdiv(stops - starts, length)
    ends = tl.cumsum(counts, 0)
    if tl.program_id(0) == 0:
        tl.store(request_splits_ptr + requests + 1, ends, mask=exists)

    splits = tl.program_id(0) * SPLIT_BLOCK + tl.arange(0, SPLIT_BLOCK)
    is_before = (ends[None, :] <= splits[:, None]) & exists[None, :]
    request = tl.sum(is_before.to(tl.int32), 1)
    first = tl.sum(tl.where(is_before, counts[None, :], 0), 1)
    needed = request < batch
    start = tl.load(kv_indptr_ptr + request, mask=needed, other=0).to(tl.int32) + (splits - first) * length
    stop = tl.load(kv_indptr_ptr + request + 1, mask=needed, other=0).to(tl.int32)
    inside = splits < num_splits
    tl.store(split_request_ptr + splits, tl.where(needed, request, 0), mask=inside)
    tl.store(split_start_ptr + splits, tl.where(needed, start, 0), mask=inside)
    tl.store(split_stop_ptr + splits, tl.where(needed, tl.minimum(start + length, stop), 0), mask=inside)


def batch_block(batch: int) -> int:
    """A power of two that holds the requests of a batch."""
    return max(_BATCH_BLOCK, triton.next_power_of_2(batch))


def _most_splits(num_kv_heads: int, device: torch.device) -> int:
    """Splits of the most waves, one program per KV head each; every request may add one that is not full."""
    return max(1, _WAVES * _programs_at_once(device) // num_kv_heads)


def _programs_at_once(device: torch.device) -> int:
    return _PROGRAMS_PER_SM * _num_sms(device)


def _num_sms(device: torch.device) -> int:
    # In tests without a GPU the kernels run on CPU tensors.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
