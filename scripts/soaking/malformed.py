"""Requests that no server should serve: each is refused, and the requests beside it do not notice."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Malformed(NamedTuple):
    """Path and body of a request."""

    path: str
    body: bytes


def _generate(**fields: Any) -> Malformed:
    return Malformed("/generate", json.dumps(fields).encode())


def _sampling(**parameters: Any) -> Malformed:
    return _generate(text="the code for the", sampling_params=parameters)


def _chat(**fields: Any) -> Malformed:
    return Malformed("/v1/chat/completions", json.dumps(fields).encode())


_FEW = {"max_new_tokens": 2}
_HELLO = [{"role": "user", "content": "the code for the"}]

MALFORMED: dict[str, Malformed] = {
    "no JSON": Malformed("/generate", b"{"),
    "no UTF-8": Malformed("/generate", b'{"text": "\xff\xfe"}'),
    "no object": Malformed("/generate", b"[]"),
    "nothing": _generate(),
    "number for a text": _generate(text=5, sampling_params=_FEW),
    "number among texts": _generate(text=["a", 5], sampling_params=_FEW),
    "empty text": _generate(text="", sampling_params=_FEW),
    "no token ids": _generate(input_ids=[], sampling_params=_FEW),
    "words for token ids": _generate(input_ids=["a"], sampling_params=_FEW),
    "list of parameters": _generate(text="a", sampling_params=[]),
    "unknown parameter": _sampling(max_new_tokenz=2),
    "negative max_new_tokens": _sampling(max_new_tokens=-1),
    "word for max_new_tokens": _sampling(max_new_tokens="two"),
    "max_new_tokens of 1e20": _sampling(max_new_tokens=10**20),
    "negative temperature": _sampling(temperature=-1),
    "word for temperature": _sampling(temperature="hot"),
    "number to stop at": _sampling(stop=5),
    "open parenthesis": _sampling(regex="(", **_FEW),
    "no JSON schema": _sampling(json_schema="{", **_FEW),
    "unknown adapter": _generate(text="a", lora_path="none", sampling_params=_FEW),
    "longer than the pool": _generate(text="the code " * 1200, sampling_params=_FEW),
    "longer than the context": _generate(text="the code " * 3000, sampling_params=_FEW),
    "chat longer than the context": _chat(messages=[{"role": "user", "content": "the code " * 3000}]),
    "no messages": _chat(messages=[]),
    "word for messages": _chat(messages="hello"),
    "negative max_tokens": _chat(messages=_HELLO, max_tokens=-3),
    "max_tokens beyond the context": _chat(messages=_HELLO, max_tokens=99_999),
}
"""By name. SGLang answers each with a status of 400 to 599; some others, such as token ids beyond the vocabulary or a
fractional ``max_new_tokens``, end the scheduler of a stock server too."""
