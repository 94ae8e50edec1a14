"""The two workloads, and what is kept of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from load_bench.client import Answer, send
from load_bench.conversations import Request
from load_bench.counters import Counters, Counts
from load_bench.random_traffic import RandomTraffic
from local_server import LocalServer

MULTI_TURN, BENCH_SERVING = "multi-turn", "bench-serving"
WORKLOADS = (MULTI_TURN, BENCH_SERVING)


def multi_turn(
    server: LocalServer, requests: Sequence[Request], reply_len: int, concurrency: int, eos: str
) -> dict[str, Any]:
    """Serve conversations.

    Parameters
    ----------
    server
        Started with the flags of `load_bench.counters`.
    eos
        The model's end-of-text token: what it says after that is not part of its answer.

    Raises
    ------
    RuntimeError
        The server counted other retractions than it told its clients.
    """
    # Compiles what is compiled at first use: a prompt, and one that goes on from it.
    first = requests[0].user
    send(server.url, [request for request in requests if request.user == first][:2], 8, concurrency=1)
    server.flush_cache()
    counters = Counters(server)
    answers, seconds = send(server.url, requests, reply_len, concurrency)
    counts = counters.counts()
    told = sum(answer.retractions for answer in answers)
    if not any(answer.error for answer in answers) and told != counts.retractions:
        raise RuntimeError(f"the server counts {counts.retractions} retractions and told its clients of {told}")
    return summarize(requests, answers, seconds, counts, eos)


def summarize(
    requests: Sequence[Request], answers: Sequence[Answer], seconds: float, counts: Counts, eos: str
) -> dict[str, Any]:
    """The row of a multi-turn workload; ``right`` is None where no answer can be."""
    answered = [answer for answer in answers if answer.error is None]
    judged = [(request, answer) for request, answer in zip(requests, answers, strict=True) if request.expected]
    right = [request.expected.is_correct(answer.text.partition(eos)[0]) for request, answer in judged]
    return {
        "workload": MULTI_TURN,
        "requests": len(requests),
        "completed": len(answered),
        "errors": sorted({answer.error for answer in answers if answer.error}),
        "right": sum(right) / len(right) if right else None,
        **_cached(sum(a.prompt_tokens for a in answered), sum(a.cached_tokens for a in answered)),
        **vars(counts),
        "output_throughput": sum(answer.completion_tokens for answer in answered) / seconds,
        "request_throughput": len(answered) / seconds,
        "seconds": seconds,
        **_percentiles("ttft", [answer.ttft_s for answer in answered]),
        **_percentiles("latency", [answer.latency_s for answer in answered]),
    }


def bench_serving(server: LocalServer, traffic: RandomTraffic) -> dict[str, Any]:
    """Serve SGLang's own benchmark."""
    server.flush_cache()
    counters = Counters(server)
    result = traffic.run(server.url, server.model)
    report = result["cache_report"]
    return {
        "workload": BENCH_SERVING,
        "requests": traffic.num_prompts,
        "completed": result["completed"],
        "errors": [],
        "right": None,
        **_cached(report["total_prompt_tokens"], report["total_cached_tokens"]),
        **vars(counters.counts()),
        "output_throughput": result["output_throughput"],
        "request_throughput": result["request_throughput"],
        "seconds": result["duration"],
        "ttft_p50_ms": result["median_ttft_ms"],
        "ttft_p99_ms": result["p99_ttft_ms"],
        "latency_p50_ms": result["median_e2e_latency_ms"],
        "latency_p99_ms": result["p99_e2e_latency_ms"],
    }


def _cached(prompt_tokens: int, cached_tokens: int) -> dict[str, Any]:
    hit_rate = cached_tokens / prompt_tokens if prompt_tokens else None
    return {"prompt_tokens": prompt_tokens, "cached_tokens": cached_tokens, "hit_rate": hit_rate}


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    p50, p99 = (1e3 * np.percentile(seconds, (50, 99))).tolist() if seconds else (None, None)
    return {f"{name}_p50_ms": p50, f"{name}_p99_ms": p99}
