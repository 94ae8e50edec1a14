"""Traffic whose answers are compared between servers: each function returns what the server said, in order."""

from __future__ import annotations

import random
import threading

import requests

from local_server import LocalServer
from recall_tasks import RecallItem, make_items

Said = list[tuple]


def shared_prefix(server: LocalServer) -> Said:
    """Three questions about one document longer than a prefill chunk, twice: misses, prefix hits, full hits."""
    item = make_items("multi_turn", seed=1, count=1, target_tokens=800, questions=3)[0]
    prompts = [f"{item.document}\nQuestion: {turn.question}\nAnswer:" for turn in item.turns]
    return [_said(server.generate(prompt, max_new_tokens=24)) for prompt in prompts * 2]


def chat(server: LocalServer) -> Said:
    """A conversation of four turns that goes on from the server's own answers."""
    return _converse(server, [], _chat_item())


def scripted_chat(server: LocalServer) -> Said:
    """The same questions whose answers so far are given, so that prompts do not depend on the server."""
    item = _chat_item()
    return [complete_chat(server, item.messages(turn)) for turn in range(len(item.turns))]


def two_users(server: LocalServer) -> Said:
    """Two users, two turns each, one long system prompt in common."""
    common = make_items("multi_needle", seed=3, count=1, target_tokens=400)[0].document
    said = []
    for seed in (4, 5):
        item = make_items("multi_turn", seed=seed, count=1, target_tokens=100, questions=2)[0]
        said += _converse(server, [{"role": "system", "content": common}], item)
    return said


def concurrent(server: LocalServer) -> Said:
    """Twenty requests at once, of unequal lengths; more than a small pool holds.

    In one call: how many requests run together must not depend on how fast clients connect.
    """
    prompts = [prompt for length in (60, 100, 160, 240) for prompt in _prompts(seed=length, count=5, tokens=length)]
    return [tuple(answer["output_ids"]) for answer in server.generate(prompts, **_to_the_end(200))]


def more_than_the_pool(server: LocalServer) -> Said:
    """Documents that together exceed the pool, then the first one again: it has been evicted."""
    prompts = _prompts(seed=6, count=6, tokens=600)
    return [_said(server.generate(prompt, max_new_tokens=8)) for prompt in [*prompts, prompts[0]]]


def aborts(server: LocalServer) -> Said:
    """Clients that hang up, a request that is aborted, and then an ordinary question."""
    prompts = _prompts(seed=7, count=4, tokens=300)
    for prompt in prompts[:2]:
        body = {"text": prompt, "stream": True, **_to_the_end(400)}
        with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=60) as response:
            next(response.iter_lines())
    finished = []
    worker = threading.Thread(
        target=lambda: finished.append(server.generate(prompts[2], rid="to-abort", **_to_the_end(1500)))
    )
    worker.start()
    while not finished:
        requests.post(f"{server.url}/abort_request", json={"rid": "to-abort"}, timeout=30)
        worker.join(timeout=0.2)
    assert finished[0]["meta_info"]["finish_reason"]["type"] == "abort"
    return [tuple(server.generate(prompts[3], max_new_tokens=24)["output_ids"])]


def complete_chat(server: LocalServer, messages: list[dict[str, str]], max_tokens: int = 24) -> tuple[str, int]:
    """Answer and cached prompt tokens of one greedy chat completion."""
    reply = server.chat(messages, max_tokens=max_tokens)
    return reply.text, reply.cached_tokens


def _chat_item() -> RecallItem:
    return make_items("multi_turn", seed=2, count=1, target_tokens=600, questions=4)[0]


def _converse(server: LocalServer, messages: list[dict[str, str]], item: RecallItem) -> Said:
    """Ask the item's questions in turn, after ``messages``, each after the server's own answers so far."""
    said = []
    for turn in range(len(item.turns)):
        messages.append(item.messages(turn)[-1])
        said.append(complete_chat(server, messages))
        messages.append({"role": "assistant", "content": said[-1][0]})
    return said


def _said(answer: dict) -> tuple:
    return tuple(answer["output_ids"]), answer["meta_info"]["cached_tokens"]


def _prompts(seed: int, count: int, tokens: int) -> list[str]:
    items: list[RecallItem] = make_items("single_needle", seed=seed, count=count, target_tokens=tokens)
    random.Random(seed).shuffle(items)
    return [item.plain_prompt() for item in items]


def _to_the_end(max_new_tokens: int) -> dict:
    return {"sampling_params": {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}}
