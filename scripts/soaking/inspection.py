"""What must hold of a server between programs: nothing runs, nothing leaks, and it answers as when it was new."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import requests

from local_server import LocalServer
from recall_tasks import make_items
from soaking.execution import flush

DRAIN_TIMEOUT_S = 60.0
PROBE_TIMEOUT_S = 300.0
STRICT = {
    # Slots free, cached and in use add up to the pool's size, after each batch and when idle; when idle, all slots of
    # requests are free.
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    # No page that a request owns is free, none is free twice.
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_ENABLE_TREE_CACHE_SANITY_CHECK": "1",
    # Indices in range, numbers finite.
    "SGLANG_INVARIANT_CHECK": "2",
    # Seconds after which a client that went away is noticed.
    "SGLANG_REQUEST_STATE_WAIT_TIMEOUT": "1",
    # A server whose scheduler fails may otherwise wait a minute for a GPU's core dump.
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
}
"""SGLang's own checks, which end the scheduler with the reason. Sizes are published after each batch with
``--decode-log-interval 1 --enable-metrics``."""

COUNTERS = {
    "requests": "sglang:num_requests_total",
    "aborted": "sglang:num_aborted_requests_total",
    "retracted": "sglang:num_retracted_requests_total",
    "evicted tokens": "sglang:evicted_tokens_total",
    "prompt tokens": "sglang:prompt_tokens_total",
    "cached prompt tokens": "sglang:cached_tokens_total",
    "answer tokens": "sglang:generation_tokens_total",
}
_RUNNING = ("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:kv_used_tokens")


class Unhealthy(RuntimeError):
    """The server leaks, hangs, changed its mind, or is gone."""


class Answer(NamedTuple):
    """Tokens of an answer and their log-probabilities."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Inspector:
    """Inspects one server; a new one remembers how it answers.

    Parameters
    ----------
    server
        Running, started with `STRICT`.
    """

    def __init__(self, server: LocalServer):
        self.server = server
        self._first = self.probe()

    def inspect(self) -> None:
        """Wait until nothing runs, account for every slot, empty the cache, and ask what was asked at first.

        Raises
        ------
        Unhealthy
            With its last words if the server is gone.
        """
        try:
            self._drain()
            answers = self.probe()
        except Unhealthy:
            raise
        except (requests.RequestException, RuntimeError) as error:
            raise Unhealthy(f"{error!r}\n{_last_words(self.server.log())}") from error
        if answers != self._first:
            raise Unhealthy(f"on an empty cache it answers {answers} and answered {self._first} when it was new")

    def probe(self) -> list[Answer]:
        """Two questions about a document of several chunks, one after the other on an empty cache.

        Asked again where the server's time limit cut them: the first ones wait for kernels to be compiled.
        """
        item = make_items("multi_turn", seed=77, count=1, target_tokens=600, questions=2)[0]
        deadline = time.monotonic() + PROBE_TIMEOUT_S
        while True:
            flush(self.server)
            try:
                return [self._answer(item.plain_prompt(turn)) for turn in range(2)]
            except RuntimeError as error:
                if "answered 503" not in str(error) or time.monotonic() > deadline:
                    raise

    def counters(self) -> dict[str, int]:
        """Totals since the server was started."""
        metrics = self.server.metrics()
        return {name: int(metrics.get(metric, 0)) for name, metric in COUNTERS.items()}

    def _answer(self, prompt: str) -> Answer:
        reply: dict[str, Any] = self.server.generate(prompt, max_new_tokens=24, return_logprob=True)
        logprobs = reply["meta_info"]["output_token_logprobs"]
        return Answer(tuple(reply["output_ids"]), tuple(logprob for logprob, *_ in logprobs))

    def _drain(self) -> None:
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while True:
            metrics = self.server.metrics()
            size, free, cached = (
                metrics[f"sglang:{name}"]
                for name in ("max_total_num_tokens", "kv_available_tokens", "kv_evictable_tokens")
            )
            if not any(metrics[name] for name in _RUNNING) and free + cached == size:
                return
            if time.monotonic() > deadline:
                state = {name: metrics[name] for name in _RUNNING} | {"free": free, "cached": cached, "size": size}
                raise Unhealthy(f"{DRAIN_TIMEOUT_S:.0f} s after the last request the pool is not whole: {state}")
            time.sleep(0.1)


def _last_words(log: str) -> str:
    """Why a scheduler ended, or just the end of the log."""
    begin = log.find("Scheduler hit an exception")
    return log[-3000:] if begin < 0 else log[begin : begin + 3000]
