"""Random programs of requests, malformed ones, leaks and a killed scheduler; and that faults are found by them.

``scripts/soak.py`` does the first for as long as it is let; docs/reliability.md has what it found.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from local_server import LocalServer
from soaking.execution import flush
from soaking.fleet import SERVERS, Fleet, make_server, running
from soaking.generation import make_program
from soaking.malformed import MALFORMED
from soaking.programs import Document, Excerpt, Program, Request, Wave

FAULTY_LAUNCHER = (sys.executable, str(Path(__file__).with_name("faulty_server.py")))
# Of programs with crowds, a flush and every fate.
SEED = 22
PROGRAMS = 3
# On a busy machine too, few requests are cut.
REQUEST_LIMIT_S = 60
END_S = 90


@pytest.fixture(scope="module")
def fault(tmp_path_factory):
    """The file whose text is the fault of the lossless server."""
    path = tmp_path_factory.mktemp("fault") / "fault"
    # Servers inherit the environment.
    os.environ["FAULT_FILE"] = str(path)
    yield path
    del os.environ["FAULT_FILE"]


@pytest.fixture(scope="module")
def serve(fault):
    """A function from names to running servers; those that an earlier test ended are started again."""
    servers: dict[str, LocalServer] = {}
    with ExitStack() as stack:

        def start(*names: str) -> dict[str, LocalServer]:
            missing = {name: _make(name) for name in names if name not in servers or not servers[name].is_running()}
            stack.enter_context(running(missing.values()))
            servers.update(missing)
            return {name: servers[name] for name in names}

        yield start


def _make(name: str) -> LocalServer:
    launcher = {"launcher": FAULTY_LAUNCHER} if name == "lossless" else {}
    return make_server(name, request_limit_s=REQUEST_LIMIT_S, **launcher)


@pytest.fixture
def fleet(serve):
    return Fleet(serve(*SERVERS))


def test_random_programs(fleet):
    for number in range(PROGRAMS):
        program = make_program(SEED, number)
        problems = fleet.examine(program)
        assert not problems, "\n".join([*problems, program.to_json()])
    assert fleet.totals["compared"] > fleet.totals["requests"] // 3
    for counters in fleet.counters().values():
        assert counters["evicted tokens"] > 1000 and counters["aborted"] > 0, counters


def test_a_crowd_that_overflows_the_pool(fleet):
    documents = tuple(Document("single_needle", seed, 80) for seed in range(4))
    crowd = [
        Request(Excerpt(number % 4, 1 + number // 4), question=0, via="generate", max_new_tokens=160, ignore_eos=True)
        for number in range(16)
    ]
    before = fleet.counters()
    assert fleet.examine(Program(documents, (Wave(tuple(crowd)),))) == []
    assert fleet.totals["compared"] == len(crowd)
    for name, counters in fleet.counters().items():
        assert counters["retracted"] > before[name]["retracted"], name


def test_malformed_and_oversize_requests_are_refused_as_by_the_dense_server(fleet):
    asked = Request(Excerpt(0, 4), question=0, via="generate", max_new_tokens=60, ignore_eos=True)
    program = Program((Document("multi_needle", 1, 240),), (Wave((asked, asked), malformed=tuple(MALFORMED)),))
    assert fleet.examine(program) == []
    assert fleet.totals["answered"] == 2 and fleet.totals["malformed"] == len(MALFORMED)


@pytest.mark.parametrize("name", ["another request's rows", "a repeated row", "rows in wrong slots"])
def test_wrong_rows_are_found(name, fleet, fault):
    server = fleet.servers["lossless"]
    with _switched_on(fault, name):
        verdicts = (fleet.examine(make_program(SEED, number)) for number in range(PROGRAMS))
        problems = next(filter(None, verdicts), [])
    flush(server)
    assert problems and all(problem.startswith("lossless: ") for problem in problems), problems
    server.log_line(f"FAULT: {name}")


def test_a_leaked_slot_is_found(fleet, fault):
    with _switched_on(fault, "a leaked slot"):
        problems = fleet.examine(make_program(SEED, 0))
    assert problems and all(problem.startswith("lossless: ") for problem in problems), problems
    _wait_for_the_end(fleet.servers["lossless"])
    fleet.servers["lossless"].log_line("memory leak detected|Pool Mem Leak Detected")


def test_clients_of_a_killed_scheduler_get_an_error_and_the_server_exits(serve):
    server = serve("compressed")["compressed"]
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(_ask_for_much, server, number, stream=number % 2 == 0) for number in range(6)]
        _wait_for_requests(server, 2)
        assert not any(request.done() for request in waiting)
        _kill_scheduler(server)
        ends = [request.result(timeout=END_S) for request in waiting]
    assert all(
        isinstance(end, requests.ConnectionError | requests.exceptions.ChunkedEncodingError) or end >= 500
        for end in ends
    ), ends
    _wait_for_the_end(server)


@contextmanager
def _switched_on(fault: Path, name: str) -> Iterator[None]:
    fault.write_text(name)
    try:
        yield
    finally:
        fault.unlink()


def _ask_for_much(server: LocalServer, number: int, stream: bool) -> int | requests.RequestException:
    """HTTP status, or the error, of a request for more than the server says before it is killed."""
    sampling = {"temperature": 0, "max_new_tokens": 900, "ignore_eos": True}
    body = {"text": f"the code for {number} is", "stream": stream, "sampling_params": sampling}
    try:
        return requests.post(f"{server.url}/generate", json=body, timeout=END_S / 2).status_code
    except requests.RequestException as error:
        return error


def _wait_for_requests(server: LocalServer, count: int) -> None:
    """Until so many run."""
    deadline = time.monotonic() + END_S
    while server.metrics()["sglang:num_running_reqs"] < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _wait_for_the_end(server: LocalServer) -> None:
    deadline = time.monotonic() + END_S
    while server.is_running():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _kill_scheduler(server: LocalServer) -> None:
    for process in psutil.Process(server.pid).children(recursive=True):
        if "scheduler" in " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
            return
    raise LookupError(f"no scheduler among the processes of {server.pid}")
