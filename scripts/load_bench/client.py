"""Sends conversations to a server, streaming, so many requests at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from load_bench.conversations import Request

# Of one request; the slowest wait for the others' memory.
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    Parameters
    ----------
    error
        Why there is no answer, or None. The other fields are 0 and empty then.
    text
        Special tokens included.
    cached_tokens, prompt_tokens, completion_tokens
        As the server counted them; cached ones when the request was first taken up.
    retractions
        How often the server took it back out of the running batch.
    ttft_s, latency_s
        Seconds from sending it to the first token and to the end.
    """

    error: str | None = None
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    retractions: int = 0
    ttft_s: float = 0.0
    latency_s: float = 0.0


def send(url: str, requests: Sequence[Request], reply_len: int, concurrency: int) -> tuple[list[Answer], float]:
    """Answers to ``requests``, and the seconds that all of them took.

    Parameters
    ----------
    url
        Of the server.
    requests
        Sent in this order, except that a user's turn waits for the answer to the one before.
    reply_len
        Tokens of each answer.
    concurrency
        Requests under way at once, at most.
    """
    return asyncio.run(_send(url, requests, reply_len, concurrency))


async def _send(url: str, requests: Sequence[Request], reply_len: int, concurrency: int) -> tuple[list[Answer], float]:
    answers: list[Answer | None] = [None] * len(requests)
    done = {(request.user, request.turn): asyncio.Event() for request in requests}
    waiting = iter(enumerate(requests))
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def worker(waiting: Iterator[tuple[int, Request]]) -> None:
            for index, request in waiting:
                if request.turn:
                    await done[request.user, request.turn - 1].wait()
                answers[index] = await _ask(session, f"{url}/generate", request, reply_len)
                done[request.user, request.turn].set()

        start = time.perf_counter()
        await asyncio.gather(*(worker(waiting) for _ in range(concurrency)))
        return answers, time.perf_counter() - start


async def _ask(session: aiohttp.ClientSession, url: str, request: Request, reply_len: int) -> Answer:
    sampling = {"temperature": 0, "max_new_tokens": reply_len, "ignore_eos": True, "skip_special_tokens": False}
    body = {"input_ids": request.input_ids, "sampling_params": sampling, "stream": True}
    start = time.perf_counter()
    ttft, last = 0.0, None
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                return Answer(error=f"status {response.status}: {(await response.text())[:500]}")
            async for line in response.content:
                event = line.decode().removeprefix("data: ").strip()
                if not event or event == "[DONE]":
                    continue
                ttft = ttft or time.perf_counter() - start
                last = json.loads(event)
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        return Answer(error=f"{type(error).__name__}: {error}")
    return _answer(last, reply_len, ttft, time.perf_counter() - start)


def _answer(last: dict[str, Any] | None, reply_len: int, ttft_s: float, latency_s: float) -> Answer:
    """From the ``last`` event of a stream, which has the whole text."""
    if last is None or "error" in last:
        return Answer(error=str(last and last["error"]))
    meta = last["meta_info"]
    if meta["completion_tokens"] != reply_len:
        return Answer(error=f"{meta['completion_tokens']} of {reply_len} tokens: {meta['finish_reason']}")
    return Answer(
        text=last["text"],
        prompt_tokens=meta["prompt_tokens"],
        cached_tokens=meta["cached_tokens"],
        completion_tokens=meta["completion_tokens"],
        retractions=meta["num_retractions"],
        ttft_s=ttft_s,
        latency_s=latency_s,
    )
