"""The endpoint against a small HTTP server, and the command line."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from accuracy.command import main
from accuracy.endpoint import Endpoint
from accuracy.server_runs import Interview
from accuracy.tasks import file_task


class Handler(BaseHTTPRequestHandler):
    """SGLang's /generate and an OpenAI chat endpoint that answers with the last message."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.path == "/generate" and body["input_ids"] == [0]:
            return self.reply({"error": "too long"}, 400)
        if self.path == "/generate":
            tops = [[[-0.1, 5, None], [-2.5, 7, None]]] * body["sampling_params"]["max_new_tokens"]
            info = {"cached_tokens": 3, "output_top_logprobs": tops}
            return self.reply({"output_ids": [5] * len(tops), "meta_info": info})
        text = body["messages"][-1]["content"].splitlines()[-1]
        return self.reply({"choices": [{"message": {"content": text}}]})

    def do_GET(self):
        if self.path == "/v1/models":
            return self.reply({"data": [{"id": "a model"}]})
        return self.reply({}, 404)

    def reply(self, record, status=200):
        data = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.bodies = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def endpoint(server):
    return Endpoint(f"http://127.0.0.1:{server.server_port}/v1/")


def test_generate(server, endpoint):
    generated = endpoint.generate([1, 2], max_new_tokens=2, top_logprobs=2)
    assert (generated.ids, generated.cached_tokens) == ([5, 5], 3)
    assert [step.top for step in generated.steps] == [5, 5] and generated.steps[0].logprobs[1] == -2.5
    assert server.bodies[0]["top_logprobs_num"] == 2 and server.bodies[0]["sampling_params"]["temperature"] == 0


def test_an_error_is_told(endpoint):
    with pytest.raises(RuntimeError, match=r"/generate answered 400: .*too long"):
        endpoint.generate([0], max_new_tokens=1)


def test_a_server_without_generate_is_asked_for_replies(tmp_path, server, endpoint):
    assert not endpoint.has_logprobs()
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps({"input": "Find the numbers.", "outputs": ["6812"], "answer_prefix": "It is 6812"}))
    items = file_task(path).make(0, 5, 0)
    (outcome,) = Interview(endpoint, None, exact=False).ask(items, {}, lambda: None)
    assert (outcome.right, outcome.kl) == (1.0, ())
    assert server.bodies[0]["model"] == "a model" and server.bodies[0]["temperature"] == 0


def test_a_running_server_needs_its_bytes(tmp_path):
    folders = ["--results", str(tmp_path), "--work", str(tmp_path)]
    with pytest.raises(SystemExit, match="--base-url needs --bytes"):
        main(["servers", "--base-url", "http://127.0.0.1:1", *folders])


@pytest.mark.parametrize("command", ["servers", "sharing", "simulate", "stress", "report"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert "--results" in capsys.readouterr().out
