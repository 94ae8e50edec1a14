"""Times of work on a GPU, by CUDA events."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

FEWEST_TIMES, MOST_TIMES = 5, 200


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``step`` as a CUDA graph, after it has run twice to compile what it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def median_ms(step: Callable[[], object], seconds: float) -> float:
    """Median milliseconds of ``step``, run for about ``seconds`` after two runs to warm up."""
    step()
    (second,) = _times(step, 1)
    return statistics.median(_times(step, repetitions(second, seconds)))


def repetitions(one_ms: float, seconds: float) -> int:
    """How often to run what takes ``one_ms``, to spend about ``seconds``."""
    return min(MOST_TIMES, max(FEWEST_TIMES, round(1e3 * seconds / max(one_ms, 1e-3))))


def _times(step: Callable[[], object], count: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]
