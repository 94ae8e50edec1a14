"""Programs are run against a server; what it said is kept by request."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import requests

from local_server import LocalServer
from soaking.malformed import MALFORMED
from soaking.programs import Program, Request

Status = Literal["answered", "cut", "refused", "lost", "hung"]
ANSWER_TIMEOUT_S = 120.0
"""No request takes longer than this, or the server hangs."""


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Parameters
    ----------
    status
        ``answered``; ``cut``: ended before its answer, as its fate or the server's time limit wanted; ``refused``: with
        an HTTP status; ``lost``: the connection broke; ``hung``: no answer within `ANSWER_TIMEOUT_S`.
    texts
        The answer, or its beginning; one per copy.
    ids
        Their tokens; empty for chats, which do not report them.
    http_status
        Of the response, 0 without one.
    prompt
        What it was asked with: the text, or all of a chat's messages.
    detail
        The server's words where it refused, or the client's error.
    """

    status: Status
    texts: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    http_status: int = 0
    prompt: str = ""
    detail: str = ""


@dataclass
class Transcript:
    """Outcomes by a request's number, those of malformed ones in their order, and what else went wrong."""

    outcomes: list[Outcome] = field(default_factory=list)
    malformed: list[Outcome] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Conversation:
    """A document and what was asked and answered about it so far."""

    document: str
    turns: tuple[tuple[str, str], ...] = ()

    def prompt(self, question: str) -> str:
        """As `recall_tasks.RecallItem.plain_prompt` renders it."""
        past = "".join(f"\nQuestion: {asked}\nAnswer:{answer}" for asked, answer in self.turns)
        return f"{self.document}{past}\nQuestion: {question}\nAnswer:"

    def messages(self, question: str) -> list[dict[str, str]]:
        texts = [text for turn in self.turns for text in turn] + [question]
        texts[0] = f"{self.document}\n{texts[0]}"
        return [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]


def run(program: Program, server: LocalServer) -> Transcript:
    """Run ``program`` against ``server``. Conversations go on from the server's own answers."""
    said = Transcript()
    past: list[_Conversation] = []
    for wave in program.waves:
        if wave.flush:
            try:
                flush(server)
            except requests.RequestException as error:
                said.errors.append(f"the cache was not flushed: {error!r}")
        first = len(said.outcomes)
        now = [_conversation(program, first + offset, past) for offset in range(len(wave.requests))]
        # All at once: how many run together must not depend on how many threads there are.
        with ThreadPoolExecutor(len(wave.requests) + len(wave.malformed)) as pool:
            asked = [
                pool.submit(ask, server, request, conversation, program.question(first + offset))
                for offset, (request, conversation) in enumerate(zip(wave.requests, now, strict=True))
            ]
            refused = [pool.submit(send_malformed, server, name) for name in wave.malformed]
        said.outcomes += [future.result() for future in asked]
        said.malformed += [future.result() for future in refused]
        for offset, conversation in enumerate(now):
            turn = (program.question(first + offset), "".join(said.outcomes[first + offset].texts[:1]))
            past.append(_Conversation(conversation.document, (*conversation.turns, turn)))
    return said


def _conversation(program: Program, number: int, past: list[_Conversation]) -> _Conversation:
    source = program.requests()[number].source
    return past[source] if isinstance(source, int) else _Conversation(program.text(number))


def flush(server: LocalServer) -> None:
    """Empty the radix tree, once the server has noticed clients that went away."""
    response = requests.post(f"{server.url}/flush_cache", params={"timeout": 60}, timeout=ANSWER_TIMEOUT_S)
    response.raise_for_status()


def send_malformed(server: LocalServer, name: str) -> Outcome:
    """Send one of `MALFORMED`."""
    path, body = MALFORMED[name]
    headers = {"Content-Type": "application/json"}
    return _guarded(name, lambda: _post(server.url + path, data=body, headers=headers))


def ask(server: LocalServer, request: Request, conversation: _Conversation, question: str) -> Outcome:
    """Send ``request``, which asks ``question`` after ``conversation``, and see it to its end."""
    if request.via == "chat":
        messages = conversation.messages(question)
        prompt = "\n".join(message["content"] for message in messages)
        return _guarded(prompt, lambda: _chat(server, request, messages))
    prompt = conversation.prompt(question)
    send = _stream if request.via == "stream" else _generate
    return _guarded(prompt, lambda: send(server, request, prompt))


def _guarded(prompt: str, send: Any) -> Outcome:
    """The outcome of ``send()``, errors included."""
    try:
        outcome = send()
    except requests.RequestException as error:
        # A timeout within a stream comes as a ConnectionError.
        is_late = isinstance(error, requests.Timeout) or "Read timed out" in str(error)
        outcome = Outcome("hung" if is_late else "lost", detail=repr(error))
    return Outcome(**{**vars(outcome), "prompt": prompt})


def _post(url: str, timeout: float | None = None, **options: Any) -> Outcome:
    """An answer as it is, in ``detail``; ``timeout`` in seconds, of None `ANSWER_TIMEOUT_S`."""
    response = requests.post(url, timeout=timeout or ANSWER_TIMEOUT_S, **options)
    if response.status_code == 503:
        # SGLANG_REQ_RUNNING_TIMEOUT.
        return Outcome("cut", http_status=503, detail=response.text)
    status = "answered" if response.ok else "refused"
    return Outcome(status, http_status=response.status_code, detail=response.text)


def _post_within(request: Request, url: str, body: dict[str, Any]) -> Outcome:
    """The same for a client that may have less patience."""
    if request.fate.kind != "timeout":
        return _post(url, json=body)
    with suppress(requests.Timeout):
        return _post(url, json=body, timeout=request.fate.seconds)
    return Outcome("cut")


def _generate(server: LocalServer, request: Request, prompt: str) -> Outcome:
    outcome = _post_within(request, f"{server.url}/generate", {"text": prompt, "sampling_params": _sampling(request)})
    if outcome.status != "answered":
        return outcome
    answers = json.loads(outcome.detail)
    answers = answers if isinstance(answers, list) else [answers]
    is_cut = any(answer["meta_info"]["finish_reason"]["type"] == "abort" for answer in answers)
    return Outcome(
        "cut" if is_cut else "answered",
        tuple(answer["text"] for answer in answers),
        tuple(tuple(answer["output_ids"]) for answer in answers),
        outcome.http_status,
    )


def _chat(server: LocalServer, request: Request, messages: list[dict[str, str]]) -> Outcome:
    body = {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": request.max_new_tokens}
    body["ignore_eos"] = request.ignore_eos
    outcome = _post_within(request, f"{server.url}/v1/chat/completions", body)
    if outcome.status != "answered":
        return outcome
    choice = json.loads(outcome.detail)["choices"][0]
    is_cut = choice["finish_reason"] == "abort"
    text = choice["message"]["content"] or ""
    return Outcome("cut" if is_cut else "answered", (text,), http_status=outcome.http_status)


def _stream(server: LocalServer, request: Request, prompt: str) -> Outcome:
    rid = uuid.uuid4().hex
    body = {"text": prompt, "stream": True, "rid": rid, "sampling_params": _sampling(request)}
    text, ids, reason, is_aborted = "", (), None, False
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=ANSWER_TIMEOUT_S) as response:
        if not response.ok:
            return Outcome("refused", http_status=response.status_code, detail=response.text)
        for event in _events(response):
            if "error" in event:
                is_time_limit = "timeout" in str(event["error"])
                status = "cut" if is_time_limit else "refused"
                code = event["error"].get("code", response.status_code)
                return Outcome(status, (text,), (ids,), code, detail=json.dumps(event))
            text, ids, reason = event["text"], tuple(event["output_ids"]), event["meta_info"]["finish_reason"]
            if reason or len(ids) < request.fate.tokens:
                continue
            if request.fate.kind == "disconnect":
                return Outcome("cut", (text,), (ids,), 200)
            if request.fate.kind == "abort" and not is_aborted:
                is_aborted = True
                requests.post(f"{server.url}/abort_request", json={"rid": rid}, timeout=ANSWER_TIMEOUT_S)
    if reason is None:
        return Outcome("lost", (text,), (ids,), 200, detail="the stream ended without a finish reason")
    return Outcome("cut" if reason["type"] == "abort" else "answered", (text,), (ids,), 200)


def _events(response: requests.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line.removeprefix(b"data: "))


def _sampling(request: Request) -> dict[str, Any]:
    parameters = {"temperature": 0, "max_new_tokens": request.max_new_tokens, "ignore_eos": request.ignore_eos}
    return parameters | ({"n": request.copies} if request.copies > 1 else {})
