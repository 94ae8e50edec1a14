"""Real servers on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from local_server import LocalServer

# float32 so that batching does not change tokens. Idle schedulers would otherwise keep the cores busy, which the other
# servers and the tests need.
COMMON_FLAGS = ("--dtype", "float32", "--enable-cache-report", "--random-seed", "0", "--max-running-requests", "32")
COMMON_FLAGS += ("--sleep-on-idle",)
# One core for each of two ranks; SGLang asks for it where there are more ranks than NUMA nodes.
TWO_RANKS = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}


@contextmanager
def running(*servers: LocalServer) -> Iterator[None]:
    """Start servers side by side: most of a start is one thread importing modules."""
    with ExitStack() as stack, ThreadPoolExecutor(len(servers)) as pool:
        for server in pool.map(LocalServer.__enter__, servers):
            stack.push(server)
        yield


def bytes_by_the_doctor(server: LocalServer) -> int:
    """Per token, as the doctor counts them for the same flags."""
    command = [sys.executable, "-m", "sglang_spark.doctor", "--json", "--model-path", server.model, *server.arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=server.env)
    return json.loads(run.stdout)["model"]["bytes_per_token"]["spark"]


def tokens_of(said: list[tuple]) -> list:
    """What was said, without how much was cached: pools of other sizes evict otherwise."""
    return [answer[0] if isinstance(answer[0], (tuple, str)) else answer for answer in said]
