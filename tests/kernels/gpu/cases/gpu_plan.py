"""Splits of decode steps on an H100; run by test_gpu_kernels.py."""

import heapq
import random
from itertools import product

import pytest
import torch

from spark_kernels import gpu
from spark_kernels.gpu import plan as planning

NUM_SMS = 132


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    monkeypatch.setattr(planning, "_num_sms", lambda device: NUM_SMS)


def _plan(lengths: list[int], num_kv_heads: int = 8) -> gpu.DecodePlan:
    indptr = torch.tensor([0, *lengths]).cumsum(0)
    return gpu.DecodePlan.build(indptr, torch.zeros(1, dtype=torch.int64), num_kv_heads)


@pytest.mark.parametrize("batch", [1, 7, 64, 300])
def test_every_token_is_in_one_split(batch):
    lengths = torch.randint(0, 6000, (batch,))
    indptr = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    plan = _plan(lengths.tolist())
    count = plan.request_splits[-1]
    request, start, stop = (x[:count] for x in (plan.split_request, plan.split_start, plan.split_stop))
    assert (start < stop).all() and not plan.split_stop[count:].any()
    assert torch.equal(request, torch.arange(batch).repeat_interleave(plan.request_splits.diff()).int())
    # Split after split, from a request's first token to its last.
    assert torch.equal(start[1:], stop[:-1]) and start[0] == 0 and stop[-1] == indptr[-1]
    assert (start >= indptr[request]).all() and (stop <= indptr[request + 1]).all()


def test_many_short_requests_are_not_split():
    assert _plan([400] * 200).request_splits[-1] == 200


def _efficiency(lengths: list[int], num_kv_heads: int) -> float:
    """The share of the GPU's time that goes into tokens, if programs start in order as others end.

    A program takes whole blocks of tokens, and its split's own cost.
    """
    plan = _plan(lengths, num_kv_heads)
    slots = planning._PROGRAMS_PER_SM * NUM_SMS
    ends = [0] * slots
    for tokens in (plan.split_stop - plan.split_start).tolist():
        blocks = -(-tokens // planning._SPLIT_STEP) * planning._SPLIT_STEP
        for _ in range(num_kv_heads if tokens else 0):
            heapq.heapreplace(ends, ends[0] + blocks + planning._SPLIT_COST)
    return sum(lengths) * num_kv_heads / (slots * max(ends))


@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
def test_programs_end_together(ragged):
    """Batches of 1 to 256 requests of up to 1k to 128k tokens, 4,096 or more for each program at once."""
    rng = random.Random(0)
    found = []
    for num_kv_heads, batch, longest in product((2, 8), (1, 3, 8, 32, 100, 256), (1024, 8192, 32768, 131072)):
        lengths = [rng.randint(longest // 8, longest) if ragged else longest for _ in range(batch)]
        if sum(lengths) * num_kv_heads >= 4096 * planning._PROGRAMS_PER_SM * NUM_SMS:
            found.append(_efficiency(lengths, num_kv_heads))
    assert len(found) >= 15
    assert min(found) >= 0.8 and sum(found) / len(found) >= 0.88


def test_a_short_context_is_cut_as_fine_as_it_pays():
    plan = _plan([4096])
    assert (plan.split_stop - plan.split_start).max() == planning._SHORTEST_SPLIT
