"""Start an SGLang server on this machine and stop it again; what the demo, the tests and the evaluations share."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import requests
from openai.types.chat import ChatCompletion

RECALL_MODEL = Path(__file__).resolve().parent / "recall-model"
START_TIMEOUT_S = 420.0
STOP_TIMEOUT_S = 30.0
FLUSH_TIMEOUT_S = 10.0


LAUNCH_SERVER = (sys.executable, "-m", "sglang.launch_server")
# The command that installing SGLang puts beside the interpreter.
SGLANG_SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")

CAPACITY_LINE = (
    r"SparK KV cache: (\d+) bytes per token against (\d+) dense \([\d.]+\), (.*), (\S+) values, "
    r"(\d+) tokens against (\d+) dense"
)


class Reply(NamedTuple):
    """What a server said, how many prompt tokens it found in its cache, and how many there were."""

    text: str
    cached_tokens: int
    prompt_tokens: int

    @classmethod
    def of(cls, completion: ChatCompletion) -> Reply:
        """The first choice of a completion by the OpenAI client."""
        usage = completion.usage
        # Reported with --enable-cache-report only.
        cached_tokens = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        return cls(completion.choices[0].message.content, cached_tokens, usage.prompt_tokens)


class Capacity(NamedTuple):
    """What a server with ``--kv-compress spark`` reports at start-up."""

    bytes_per_token: int
    dense_bytes_per_token: int
    kept: str
    value_dtype: str
    tokens: int
    dense_tokens: int


class ServerFailed(RuntimeError):
    """The server exited, or did not answer in time; the message ends with its log."""


class LocalServer:
    """An SGLang server as a context manager.

    Parameters
    ----------
    arguments
        Command-line arguments after ``--model-path`` and ``--port``.
    model
        Folder of the model.
    env
        Environment variables besides this process's own.
    launcher
        The command that starts it: `LAUNCH_SERVER` or `SGLANG_SERVE`.
    start_timeout
        Seconds after which a server that is not ready has failed.
    """

    def __init__(
        self,
        *arguments: str,
        model: Path | str = RECALL_MODEL,
        env: dict[str, str] | None = None,
        launcher: tuple[str, ...] = LAUNCH_SERVER,
        start_timeout: float = START_TIMEOUT_S,
    ):
        self.start_timeout = start_timeout
        self.arguments = arguments
        self.launcher = launcher
        self.model = str(model)
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {**os.environ, **(env or {})}
        self._log = tempfile.NamedTemporaryFile("w+", prefix="sglang-", suffix=".log", delete=False)
        self._process: subprocess.Popen | None = None

    @property
    def command(self) -> list[str]:
        return [*self.launcher, "--model-path", self.model, "--port", str(self.port), *self.arguments]

    def __enter__(self) -> LocalServer:
        # A session of its own, so that stopping the server stops its scheduler and detokenizer too.
        self._process = subprocess.Popen(
            self.command, stdout=self._log, stderr=subprocess.STDOUT, env=self.env, start_new_session=True
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.stop()
        os.unlink(self._log.name)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerFailed(f"the server exited with status {self._process.returncode}:\n{self.log()[-6000:]}")
            # The log line comes after the server's own warm-up request; /health answers before it.
            if "The server is fired up and ready to roll!" in self.log():
                return
            time.sleep(0.25)
        raise ServerFailed(f"the server did not answer within {self.start_timeout:.0f} s:\n{self.log()[-6000:]}")

    def stop(self) -> None:
        """End the server and every process it started."""
        if self._process is None:
            return
        # Only the launcher: it stops the others, and takes one that dies before it for a crash.
        self._process.terminate()
        try:
            self._process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    @property
    def pid(self) -> int:
        """The server's main process.

        Raises
        ------
        RuntimeError
            It was not started, or has been stopped.
        """
        if self._process is None:
            raise RuntimeError("the server has no process: it is not between start and stop")
        return self._process.pid

    def is_running(self) -> bool:
        """Whether the server's main process is alive."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """Everything the server has printed so far."""
        return Path(self._log.name).read_text(errors="replace")

    def log_line(self, pattern: str) -> re.Match:
        """The first match of a regular expression in the log."""
        match = re.search(pattern, self.log())
        if match is None:
            raise LookupError(f"no log line matches {pattern!r}:\n{self.log()[-3000:]}")
        return match

    def info(self) -> dict[str, Any]:
        """``/server_info``: resolved arguments and sizes."""
        return self._json(requests.get(f"{self.url}/server_info", timeout=30))

    def metrics(self) -> dict[str, float]:
        """``/metrics`` of a server with ``--enable-metrics``; series of one name are added up."""
        response = requests.get(f"{self.url}/metrics", timeout=30)
        response.raise_for_status()
        values: dict[str, float] = {}
        for name, value in re.findall(r"^([\w:]+)(?:\{.*\})? (\S+)$", response.text, re.MULTILINE):
            values[name] = values.get(name, 0.0) + float(value)
        return values

    def generate(self, text: str | list[str] | None = None, *, max_new_tokens: int = 16, **request: Any) -> Any:
        """One greedy ``/generate`` call; ``request`` adds or replaces fields of its body.

        Returns the answer, a dictionary, or for several texts a list of them.
        """
        body: dict[str, Any] = {
            "sampling_params": {"temperature": 0, "max_new_tokens": max_new_tokens},
            **request,
        }
        if text is not None:
            body["text"] = text
        return self._json(requests.post(f"{self.url}/generate", json=body, timeout=300))

    def chat(self, messages: list[dict[str, str]], *, max_tokens: int) -> Reply:
        """One greedy chat completion through the OpenAI client."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none")
        response = client.chat.completions.create(
            model=self.model, messages=messages, temperature=0, max_tokens=max_tokens
        )
        return Reply.of(response)

    def capacity(self) -> Capacity:
        """The start-up line about the compressed cache."""
        size, dense_size, kept, value_dtype, tokens, dense_tokens = self.log_line(CAPACITY_LINE).groups()
        return Capacity(int(size), int(dense_size), kept, value_dtype, int(tokens), int(dense_tokens))

    def flush_cache(self) -> None:
        """Empty the radix tree, as soon as SGLang counts no request as running."""
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while (response := requests.post(f"{self.url}/flush_cache", timeout=30)).status_code == 400:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        response.raise_for_status()

    @staticmethod
    def _json(response: requests.Response) -> Any:
        if not response.ok:
            raise RuntimeError(f"{response.url} answered {response.status_code}: {response.text[:1000]}")
        return response.json()


@contextlib.contextmanager
def serving(url: str | None, *arguments: str) -> Iterator[str]:
    """The URL of a server: ``url``, or that of a `LocalServer` with ``arguments`` where it is None."""
    if url is not None:
        yield url.rstrip("/")
        return
    with LocalServer("--max-total-tokens", "16384", "--enable-cache-report", *arguments) as server:
        yield server.url


def _free_port() -> int:
    """A port that is free, as is likely the one 10,000 above, where SGLang may put its gRPC endpoint."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port + 10_000 < 1 << 16:
            return port
