"""Ways of asking: each function asks one server and returns what it said, as those in ``traffic`` do."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import requests
from safetensors.torch import load_file

from local_server import LocalServer
from recall_tasks import make_items

ADAPTER = "random"
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "green", "blue"]}, "size": {"type": "integer", "maximum": 99}},
    "required": ["color", "size"],
}
PATTERN = r"(red|green|blue) (falcon|otter), [0-9]{3}"


def json_schema(server: LocalServer) -> list[tuple]:
    """Answers held to a JSON schema, which the model would never keep by itself."""
    answers = _ask(server, json_schema=json.dumps(SCHEMA), max_new_tokens=64)
    for answer in answers:
        value = json.loads(answer["text"])
        assert value["color"] in SCHEMA["properties"]["color"]["enum"] and value["size"] <= 99
    return _said(answers)


def regex(server: LocalServer) -> list[tuple]:
    """Answers held to a regular expression."""
    answers = _ask(server, regex=PATTERN, max_new_tokens=64)
    assert all(re.fullmatch(PATTERN, answer["text"]) for answer in answers), answers
    return _said(answers)


def several_answers(server: LocalServer) -> list[tuple]:
    """Three answers to one prompt; at temperature 0 they are the same."""
    prompt = _prompts()[0]
    answers = server.generate(prompt, sampling_params={"temperature": 0, "max_new_tokens": 16, "n": 3})
    assert len(answers) == 3 and len({answer["text"] for answer in answers}) == 1
    return _said(answers)


def lora(server: LocalServer) -> list[tuple]:
    """Answers through the adapter between answers without it."""
    base, adapted, again = (
        _said([server.generate(prompt, **path) for prompt in _prompts()]) for path in ({}, {"lora_path": ADAPTER}, {})
    )
    assert base == again != adapted
    return base + adapted


def streaming(server: LocalServer) -> list[tuple]:
    """An answer in pieces, which together are the answer in one."""
    prompt = _prompts()[0]
    body = {"text": prompt, "stream": True, "sampling_params": {"temperature": 0, "max_new_tokens": 24}}
    events = []
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=300) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                events.append(json.loads(line.removeprefix(b"data: ")))
    texts = [event["text"] for event in events]
    assert len(set(texts)) > 2 and all(late.startswith(early) for early, late in itertools.pairwise(texts))
    assert texts[-1] == server.generate(prompt, max_new_tokens=24)["text"]
    return [(texts[-1],)]


def logprobs(server: LocalServer) -> tuple[list[int], list[float]]:
    """Tokens of prompt and answer, and their log-probabilities."""
    request = {"return_logprob": True, "logprob_start_len": 1, "max_new_tokens": 8}
    info = server.generate(_prompts()[0], **request)["meta_info"]
    pairs = info["input_token_logprobs"][1:] + info["output_token_logprobs"]
    return [token for _, token, *_ in pairs], [value for value, *_ in pairs]


def embeddings_status(server: LocalServer) -> int:
    """HTTP status of a request for embeddings."""
    body = {"model": server.model, "input": "the code for red falcon"}
    return requests.post(f"{server.url}/v1/embeddings", json=body, timeout=60).status_code


def _prompts() -> list[str]:
    return [item.plain_prompt() for item in make_items("single_needle", seed=41, count=2, target_tokens=200)]


def _ask(server: LocalServer, max_new_tokens: int, **constraint: str) -> list[dict]:
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, **constraint}
    return [server.generate(prompt, sampling_params=sampling) for prompt in _prompts()]


def _said(answers: list[dict]) -> list[tuple]:
    return [tuple(answer["output_ids"]) for answer in answers]


def input_ids(server: LocalServer) -> list[tuple]:
    """An answer to token ids."""
    return [tuple(server.generate(input_ids=_ids(), max_new_tokens=16)["output_ids"])]


def input_embeds(server: LocalServer) -> list[tuple]:
    """An answer to the embeddings of the same tokens, which SGLang takes without a radix cache only."""
    embeddings = load_file(Path(server.model) / "model.safetensors")["model.embed_tokens.weight"]
    rows = embeddings[_ids()].float().tolist()
    return [tuple(server.generate(input_embeds=rows, max_new_tokens=16)["output_ids"])]


def _ids() -> list[int]:
    """Longer than a prefill chunk of 256."""
    return [2 + i * 37 % 1000 for i in range(300)]
