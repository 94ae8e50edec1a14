"""A running server's public endpoints, as much of them as the evaluation asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import requests

from accuracy.metrics import NextToken

TIMEOUT_S = 600


@dataclass(frozen=True)
class Generated:
    """Greedy tokens, the likeliest next tokens at each step, and how much of the prompt came from the cache."""

    ids: list[int]
    steps: list[NextToken]
    cached_tokens: int


class Endpoint:
    """SGLang's native API, and the OpenAI API of any server.

    Parameters
    ----------
    url
        Without ``/v1``, for example ``http://127.0.0.1:30000``.
    model
        Name for the OpenAI API; the first one the server lists if None.

    Raises
    ------
    RuntimeError
        From every call, if the server answers with an error; the message holds its text.
    """

    def __init__(self, url: str, model: str | None = None):
        self.url = url.rstrip("/").removesuffix("/v1")
        self._model = model

    def has_logprobs(self) -> bool:
        """Whether SGLang's ``/generate`` is there, which takes token ids and gives log-probabilities."""
        return requests.get(f"{self.url}/server_info", timeout=TIMEOUT_S).ok

    def generate(
        self, input_ids: list[int], *, max_new_tokens: int, top_logprobs: int = 0, ignore_eos: bool = True
    ) -> Generated:
        """Greedy tokens after `input_ids`."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos}
        body: dict[str, Any] = {"input_ids": input_ids, "sampling_params": sampling}
        if top_logprobs:
            body |= {"return_logprob": True, "top_logprobs_num": top_logprobs}
        reply = self._post("/generate", body)
        info = reply["meta_info"]
        steps = [_next_token(step) for step in info.get("output_top_logprobs", [])]
        return Generated(reply["output_ids"], steps, info["cached_tokens"])

    def chat(self, messages: list[dict[str, str]], max_tokens: int) -> str:
        """A greedy reply of the OpenAI chat endpoint."""
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        return self._post("/v1/chat/completions", body)["choices"][0]["message"]["content"] or ""

    def complete(self, prompt: str, max_tokens: int) -> str:
        """A greedy reply of the OpenAI completions endpoint."""
        body = {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": max_tokens}
        return self._post("/v1/completions", body)["choices"][0]["text"]

    @property
    def model(self) -> str:
        if self._model is None:
            response = requests.get(f"{self.url}/v1/models", timeout=TIMEOUT_S)
            self._model = _read(response)["data"][0]["id"]
        return self._model

    def capacity(self) -> int:
        """Tokens that the cache has room for (SGLang)."""
        return _read(requests.get(f"{self.url}/server_info", timeout=TIMEOUT_S))["max_total_num_tokens"]

    def flush_cache(self) -> None:
        """Empty the radix tree (SGLang)."""
        requests.post(f"{self.url}/flush_cache", timeout=TIMEOUT_S).raise_for_status()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return _read(requests.post(f"{self.url}{path}", json=body, timeout=TIMEOUT_S))


def _read(response: requests.Response) -> Any:
    if not response.ok:
        raise RuntimeError(f"{response.url} answered {response.status_code}: {response.text[:1000]}")
    return orjson.loads(response.content)


def _next_token(step: list[list[Any]]) -> NextToken:
    logprobs, ids, _ = zip(*step, strict=True)
    return NextToken(np.array(ids, dtype=np.int32), np.array(logprobs, dtype=np.float32))
