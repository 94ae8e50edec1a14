"""What a server counts while it serves a workload."""

from __future__ import annotations

import re
from dataclasses import dataclass

from local_server import LocalServer

# Steps between two lines of the log about the running batch; without the flag 40.
LOG_INTERVAL = 4
FLAGS = ("--enable-metrics", "--decode-log-interval", str(LOG_INTERVAL))


@dataclass(frozen=True)
class Counts:
    """Since a `Counters` was made.

    Parameters
    ----------
    retractions
        Requests taken back out of the running batch because the cache was full, each time counted.
    evicted_tokens
        Cached tokens of finished requests that were given up.
    peak_running
        Most requests in a batch that the log has a line about.
    """

    retractions: int
    evicted_tokens: int
    peak_running: int


class Counters:
    """Counts from now on, of a server started with `FLAGS`."""

    def __init__(self, server: LocalServer):
        self._server = server
        self._log_start = len(server.log())
        self._start = self._read()

    def counts(self) -> Counts:
        now = self._read()
        retractions, evicted = (round(now[name] - start) for name, start in self._start.items())
        running = re.findall(r"#running-req: (\d+)", self._server.log()[self._log_start :])
        return Counts(retractions, evicted, max(map(int, running), default=0))

    def _read(self) -> dict[str, float]:
        metrics = self._server.metrics()
        # A counter is published from its first increment on.
        names = ("sglang:num_retracted_requests_total", "sglang:evicted_tokens_total")
        return {name: metrics.get(name, 0.0) for name in names}
