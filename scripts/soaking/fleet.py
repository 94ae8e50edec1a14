"""The servers that programs run against, side by side, and the verdict on each program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from local_server import LocalServer
from soaking.comparison import compare, failures, foreign_codes, recall
from soaking.execution import Transcript, run
from soaking.inspection import STRICT, Inspector, Unhealthy
from soaking.programs import Program

POOL_TOKENS = 1024
REQUEST_LIMIT_S = 6
"""Long enough for most requests of a program, too short for `generation.OVERLONG` tokens beside others."""

# float32 so that batching does not change tokens; a pool that a few requests fill, and a scheduler that admits more of
# them than it holds, so that it retracts and evicts; prefill in chunks.
FLAGS = ("--dtype", "float32", "--random-seed", "0", "--max-running-requests", "32", "--sleep-on-idle")
FLAGS += ("--max-total-tokens", str(POOL_TOKENS), "--chunked-prefill-size", "128", "--schedule-conservativeness", "0.1")
FLAGS += ("--enable-metrics", "--decode-log-interval", "1")
# SGLang's own warm-up compiles kernels, which takes longer than REQUEST_LIMIT_S the first time.
FLAGS += ("--skip-server-warmup",)
SERVERS = {
    "dense": (),
    "lossless": ("--kv-compress", "spark", "--spark-key-ratio", "0", "--spark-value-dtype", "auto"),
    "compressed": ("--kv-compress", "spark"),
}


def make_server(
    name: str, flags: Sequence[str] = (), request_limit_s: int = REQUEST_LIMIT_S, **options: Any
) -> LocalServer:
    """One of `SERVERS`, not started, with SGLang's strict checks; the compressed one with the canary.

    Parameters
    ----------
    flags
        More flags.
    request_limit_s
        Seconds after which it ends a request that runs.
    options
        Of `LocalServer`.
    """
    env = STRICT | {"SGLANG_REQ_RUNNING_TIMEOUT": str(request_limit_s)}
    env |= {"SGLANG_SPARK_CANARY": "1"} if name == "compressed" else {}
    return LocalServer(*FLAGS, *SERVERS[name], *flags, env=env, **options)


@dataclass
class Fleet:
    """Running servers by name, what holds of each, and what was done to them.

    Parameters
    ----------
    servers
        ``dense`` among them: what it says is right for ``lossless``.
    """

    servers: dict[str, LocalServer]
    totals: Counter[str] = field(default_factory=Counter)
    recalled: dict[str, Counter[str]] = field(default_factory=dict)

    def __post_init__(self):
        self._inspectors = dict(zip(self.servers, self._each(Inspector, self.servers.values()), strict=True))
        self.recalled = {name: Counter() for name in self.servers}

    def examine(self, program: Program) -> list[str]:
        """Run ``program`` against every server at once; what is wrong with the outcome, in words."""
        transcripts = self._run(program)
        problems = [f"{name}: {problem}" for name in transcripts for problem in self._alone(name, program, transcripts)]
        if "lossless" in transcripts:
            comparison = compare(program, transcripts["dense"], transcripts["lossless"])
            problems += [f"lossless: {difference}" for difference in comparison.differences]
            self.totals["compared"] += comparison.compared
        problems += [problem for problem in self._each(self._inspect, self._inspectors) if problem]
        self.totals["programs"] += 1
        self.totals["requests"] += len(program.requests())
        self.totals["malformed"] += sum(len(wave.malformed) for wave in program.waves)
        for request, outcome in zip(program.requests(), transcripts["dense"].outcomes, strict=True):
            is_late = outcome.status == "cut" and request.fate.kind == "finish"
            self.totals["over the time limit" if is_late else outcome.status] += 1
        return problems

    def is_running(self) -> bool:
        """Whether all servers are."""
        return all(server.is_running() for server in self.servers.values())

    def counters(self) -> dict[str, dict[str, int]]:
        """Servers' own totals, by name."""
        return {name: inspector.counters() for name, inspector in self._inspectors.items()}

    def _run(self, program: Program) -> dict[str, Transcript]:
        said = self._each(lambda server: run(program, server), self.servers.values())
        return dict(zip(self.servers, said, strict=True))

    def _alone(self, name: str, program: Program, transcripts: dict[str, Transcript]) -> list[str]:
        """What is wrong with what one server said, whatever the others did."""
        right, total = recall(program, transcripts[name])
        self.recalled[name].update(right=right, total=total)
        # `compare` reports the failures of the server that it compares.
        failed = [] if name == "lossless" else failures(transcripts[name])
        return failed + foreign_codes(program, transcripts[name])

    def _inspect(self, name: str) -> str:
        try:
            self._inspectors[name].inspect()
        except Unhealthy as error:
            return f"{name}: {error}"
        return ""

    def _each(self, do: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.servers)) as pool:
            return list(pool.map(do, items))


@contextmanager
def running(servers: Iterable[LocalServer]) -> Iterator[None]:
    """Start servers side by side: most of a start is one thread importing modules."""
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        for server in pool.map(LocalServer.__enter__, servers):
            stack.push(server)
        yield
