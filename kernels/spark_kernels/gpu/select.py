"""Which channels a key keeps: those with the largest scores, the lower position first among equals.

Scores are finite and not negative, so that as integers their bits are in their order. The threshold is searched by
counting; the search ends as soon as it parts the right number of channels from the others: for four rows side by side
after 10 to 14 rounds instead of 31.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spark_kernels.gpu.lanes import count_bits, row_max, row_sum, sum_of_lanes_before

# The search begins this far below the largest score, where most thresholds are near: four octaves.
_FIRST_STEP = tl.constexpr(4 << 23)


@triton.jit
def _reached(scores, threshold, CHANNELS: tl.constexpr):
    """How many channels of each row score at least ``threshold``, as a column."""
    signs = tl.zeros_like(scores[0]).to(tl.uint32, bitcast=True)
    for i in tl.static_range(CHANNELS):
        signs = (signs << 1) | ((threshold - 1 - scores[i]).to(tl.uint32, bitcast=True) >> 31)
    return row_sum(count_bits(signs))


@triton.jit
def _without_last_ties(scores, threshold, surplus, CHANNELS: tl.constexpr):
    """Scores of which each row's last ``surplus`` that equal ``threshold`` are lowered below it."""
    ties = tl.zeros_like(scores[0])
    for i in tl.static_range(CHANNELS):
        ties += (scores[i] == threshold).to(tl.int32)
    room = row_sum(ties) - surplus - sum_of_lanes_before(ties)
    lowered = ()
    for i in tl.static_range(CHANNELS):
        is_tie = scores[i] == threshold
        lowered = lowered + (tl.where(is_tie & (room <= 0), threshold - 1, scores[i]),)
        room -= is_tie.to(tl.int32)
    return lowered


@triton.jit
def select_channels(scores, COUNT: tl.constexpr, CHANNELS: tl.constexpr):
    """A mask for each of a thread's positions: -1 where it is one of the ``COUNT`` that its row keeps, else 0.

    ``scores`` are the bits of float32 scores, which are finite and not negative.
    """
    largest = scores[0]
    for i in tl.static_range(1, CHANNELS):
        largest = tl.maximum(largest, scores[i])

    # At least COUNT channels reach `low`, fewer reach `high`.
    high = row_max(largest) + 1
    low = tl.zeros_like(high)
    threshold = tl.maximum(high - _FIRST_STEP, 1)
    reached = low + CHANNELS * scores[0].shape[1]
    searching = True
    while searching:
        count = _reached(scores, threshold, CHANNELS)
        is_enough = count >= COUNT
        low = tl.where(is_enough, threshold, low)
        reached = tl.where(is_enough, count, reached)
        high = tl.where(is_enough, tl.where(count == COUNT, threshold + 1, high), threshold)
        threshold = low + ((high - low) >> 1)
        searching = tl.max(high - low) > 1
    if tl.max(reached) > COUNT:
        scores = _without_last_ties(scores, low, reached - COUNT, CHANNELS)
    kept = ()
    for i in tl.static_range(CHANNELS):
        kept = kept + ((low - 1 - scores[i]) >> 31,)
    return kept
