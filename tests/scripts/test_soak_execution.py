"""Requests and inspections of scripts/soaking against a stand-in for a server that says what a test wants."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from soaking import execution, inspection
from soaking.execution import run
from soaking.inspection import Inspector, Unhealthy
from soaking.programs import Document, Excerpt, Fate, Program, Request, Wave

ASKED = Request(Excerpt(0, 4), question=0, via="generate", max_new_tokens=24)
STREAMED = replace(ASKED, via="stream")
CHAT = replace(ASKED, via="chat")
DONE = {"type": "stop"}


class Handler(BaseHTTPRequestHandler):
    """Answers a POST by the function at ``server.answer``: a status and a body, or events of a stream."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.received.append((self.path, body))
        status, value = self.server.answer(self.path, body)
        self.send_response(status)
        self.end_headers()
        for piece in [value] if isinstance(value, bytes) else value:
            self.wfile.write(piece)
            self.wfile.flush()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """A server's URL and model, what it received, and ``answer`` to be set."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.received, http.url, http.model = [], f"http://127.0.0.1:{http.server_port}", "model"
        # Clients that hang up are what is tested.
        http.handle_error = lambda *args: None
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}).start()
        yield http
        http.shutdown()


def answer(text: str, ids: list[int], reason: dict | None) -> dict:
    return {"text": text, "output_ids": ids, "meta_info": {"finish_reason": reason}}


def events(*answers: dict, pause: float = 0.0):
    for event in answers:
        time.sleep(pause)
        yield f"data: {json.dumps(event)}\n\n".encode()


def outcome(server, request: Request) -> execution.Outcome:
    """What becomes of one request."""
    return run(Program((Document("kv_list", 1, 60),), (Wave((request,)),)), server).outcomes[0]


def test_answers(server):
    server.answer = lambda path, body: (200, json.dumps(answer("a b", [1, 2], DONE)).encode())
    said = outcome(server, ASKED)
    assert (said.status, said.texts, said.ids, said.http_status) == ("answered", ("a b",), ((1, 2),), 200)
    assert "Item" in said.prompt
    server.answer = lambda path, body: (200, json.dumps([answer("a", [1], DONE), answer("b", [2], DONE)]).encode())
    assert outcome(server, replace(ASKED, copies=2)).ids == ((1,), (2,))
    choice = {"message": {"content": "a b"}, "finish_reason": "stop"}
    server.answer = lambda path, body: (200, json.dumps({"choices": [choice]}).encode())
    assert outcome(server, CHAT).texts == ("a b",)
    server.answer = lambda path, body: (200, events(answer("a", [1], None), answer("a b", [1, 2], DONE)))
    assert outcome(server, STREAMED).ids == ((1, 2),)


def test_conversations_go_on_from_the_answers(server):
    server.answer = lambda path, body: (200, json.dumps(answer(" the answer", [1], DONE)).encode())
    program = Program((Document("kv_list", 1, 60),), (Wave((ASKED,)), Wave((replace(ASKED, source=0, question=1),))))
    first, second = run(program, server).outcomes
    assert second.prompt == f"{first.prompt} the answer\nQuestion: {program.question(1)}\nAnswer:"


@pytest.mark.parametrize("request_", [ASKED, STREAMED, CHAT], ids=lambda request: request.via)
def test_refusals_and_lost_connections(request_, server):
    server.answer = lambda path, body: (400, b"too long")
    assert outcome(server, request_) == replace(
        execution.Outcome("refused", http_status=400, detail="too long"), prompt=outcome(server, request_).prompt
    )
    server.shutdown()
    server.server_close()
    assert outcome(server, request_).status == "lost"


def test_the_servers_time_limit_cuts(server):
    server.answer = lambda path, body: (503, b"Request running timeout reached.")
    assert outcome(server, ASKED).status == outcome(server, CHAT).status == "cut"
    server.answer = lambda path, body: (
        200,
        events(answer("a", [1], None), {"error": {"message": "Request running timeout reached."}}),
    )
    assert outcome(server, STREAMED).status == "cut" and outcome(server, STREAMED).ids == ((1,),)


def test_a_stream_can_be_refused_after_it_began(server):
    server.answer = lambda path, body: (200, events({"error": {"message": "too long", "code": 400}}))
    assert (outcome(server, STREAMED).status, outcome(server, STREAMED).http_status) == ("refused", 400)


def test_a_stream_that_just_ends_is_lost(server):
    server.answer = lambda path, body: (200, events(answer("a", [1], None)))
    assert outcome(server, STREAMED).status == "lost"


def test_a_server_that_does_not_answer_hangs(server, monkeypatch):
    monkeypatch.setattr(execution, "ANSWER_TIMEOUT_S", 0.2)
    server.answer = lambda path, body: time.sleep(0.6) or (200, b"{}")
    assert outcome(server, ASKED).status == outcome(server, STREAMED).status == "hung"
    server.answer = lambda path, body: (200, events(answer("a", [1], None), answer("a b", [1, 2], DONE), pause=0.6))
    assert outcome(server, STREAMED).status == "hung"


def test_fates(server):
    many = [answer("x" * count, list(range(count)), None) for count in range(1, 20)]
    server.answer = lambda path, body: (200, events(*many, pause=0.02) if path == "/generate" else b"")
    gone = outcome(server, replace(STREAMED, fate=Fate("disconnect", tokens=3)))
    assert (gone.status, gone.ids) == ("cut", ((0, 1, 2),))
    server.answer = lambda path, body: (
        200,
        events(*many[:5], answer("xxxxx", list(range(5)), {"type": "abort"})) if path == "/generate" else b"",
    )
    aborted = outcome(server, replace(STREAMED, fate=Fate("abort", tokens=3)))
    assert (aborted.status, aborted.ids) == ("cut", ((0, 1, 2, 3, 4),))
    asked, abort = (json.loads(body) for _, body in server.received[-2:])
    assert server.received[-1][0] == "/abort_request" and asked["rid"] == abort["rid"]
    server.answer = lambda path, body: time.sleep(0.5) or (200, b"{}")
    assert outcome(server, replace(ASKED, fate=Fate("timeout", seconds=0.1))).status == "cut"


def test_malformed_requests_are_sent_beside_the_others(server):
    server.answer = lambda path, body: (400, b"no")
    said = run(Program((Document("kv_list", 1, 60),), (Wave((ASKED,), ("no UTF-8", "no messages")),)), server)
    assert [malformed.http_status for malformed in said.malformed] == [400, 400]
    assert b'{"text": "\xff\xfe"}' in [body for _, body in server.received]


def test_a_cache_that_is_not_flushed_is_an_error(server):
    server.answer = lambda path, body: (400, b"requests are pending")
    said = run(Program((Document("kv_list", 1, 60),), (Wave((ASKED,)), Wave((ASKED,), flush=True))), server)
    assert said.errors and "the cache was not flushed" in said.errors[0]


class Pool:
    """A server as an inspector sees it."""

    log = staticmethod(lambda: "the log")

    def __init__(self, monkeypatch):
        self.logprobs, self.sizes = -0.5, (1000, 24, 0)
        monkeypatch.setattr(inspection, "flush", lambda server: None)
        monkeypatch.setattr(inspection, "DRAIN_TIMEOUT_S", 0.2)

    def generate(self, prompt, **request):
        return {"output_ids": [1], "meta_info": {"output_token_logprobs": [(self.logprobs, 1, None)]}}

    def metrics(self):
        free, cached, used = self.sizes
        names = {"max_total_num_tokens": 1024, "num_running_reqs": 0, "num_queue_reqs": 0, "kv_available_tokens": free}
        names |= {"kv_evictable_tokens": cached, "kv_used_tokens": used}
        return {f"sglang:{name}": float(value) for name, value in names.items()}


def test_a_healthy_server_passes(monkeypatch):
    Inspector(Pool(monkeypatch)).inspect()


@pytest.mark.parametrize("sizes", [(1000, 23, 1), (1000, 23, 0), (1001, 24, 0)])
def test_a_slot_that_is_neither_free_nor_cached_is_a_leak(sizes, monkeypatch):
    pool = Pool(monkeypatch)
    inspector = Inspector(pool)
    pool.sizes = sizes
    with pytest.raises(Unhealthy, match="the pool is not whole"):
        inspector.inspect()


def test_another_answer_on_an_empty_cache_is_unhealthy(monkeypatch):
    pool = Pool(monkeypatch)
    inspector = Inspector(pool)
    pool.logprobs = -0.5000001
    with pytest.raises(Unhealthy, match=r"answered .* when it was new"):
        inspector.inspect()


def test_a_server_that_is_gone_is_unhealthy_and_its_log_is_shown(monkeypatch):
    inspector = Inspector(Pool(monkeypatch))
    inspector.server = SimpleNamespace(metrics=lambda: execution.requests.get("http://127.0.0.1:9"), log=lambda: "LOG")
    with pytest.raises(Unhealthy, match="LOG"):
        inspector.inspect()


def test_a_probe_that_the_time_limit_cuts_is_asked_again(monkeypatch):
    pool, refused = Pool(monkeypatch), ["answered 503", "answered 503"]

    def generate(prompt, **request):
        if refused:
            raise RuntimeError(refused.pop())
        return Pool.generate(pool, prompt, **request)

    monkeypatch.setattr(pool, "generate", generate, raising=False)
    Inspector(pool).inspect()
    refused.append("answered 500")
    with pytest.raises(RuntimeError, match="500"):
        Inspector(pool)
