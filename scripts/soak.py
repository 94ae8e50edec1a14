#!/usr/bin/env python3
"""Random programs of requests against a dense server, one with whole keys and a compressed one, until something fails.

    python scripts/soak.py --minutes 20 --seed 1 --json soak.json
    python scripts/soak.py --programs 50 -- --page-size 16 --context-length 960
    python scripts/soak.py --replay failure.json

A program is waves of concurrent requests to the recall model: branching conversations about documents that share
prefixes, aborts, disconnects, timeouts, and malformed requests, in a pool of 1,024 tokens. What must hold:

* the server with whole keys and values says, token by token, what the dense server says, or the beginning of it where a
  request was cut, and refuses what that refuses;
* no answer of any server has a number that stands in another request's document only;
* SGLang's own strict checks of its memory, and on the compressed server the canary, end no scheduler;
* after each program no slot of the pool is in use, the cache can be emptied, and on an empty cache each server gives
  the answers, to the last bit of their log-probabilities, that it gave when it was new;
* over all programs the compressed server answers questions as the dense server does, within 5 %.

Exits with 1 and writes the program, to be replayed, when one of these does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from soaking.fleet import REQUEST_LIMIT_S, SERVERS, Fleet, make_server, running
from soaking.generation import make_program, shrink
from soaking.inspection import COUNTERS
from soaking.programs import Program

LOST_RECALL = 0.05


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--minutes", type=float, help="how long, besides starting servers; default: 5")
    extent.add_argument("--programs", type=int, metavar="N", help="how many programs")
    extent.add_argument("--replay", type=Path, metavar="PATH", help="one program, as a failure was written")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="replay it so many times; default: 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--request-limit",
        type=int,
        default=REQUEST_LIMIT_S,
        metavar="SECONDS",
        help=f"servers end requests that run longer; default: {REQUEST_LIMIT_S}, more for a busy machine",
    )
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), help="dense among them")
    parser.add_argument(
        "--shrink", type=int, default=0, metavar="N", help="after a failure, try so many smaller programs; default: 0"
    )
    parser.add_argument("--failure", type=Path, default=Path("failure.json"), help="where a failing program is written")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write what was done and found as JSON")
    parser.add_argument("server_args", nargs="*", metavar="-- SERVER_ARGUMENT", help="more flags for every server")
    args = parser.parse_args(argv)
    if "dense" not in args.servers:
        parser.error(f"--servers {' '.join(args.servers)}: dense is what the others are compared with")
    for name in ("minutes", "programs", "repeat", "request_limit"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.shrink < 0:
        parser.error(f"--shrink must not be negative, got {args.shrink}")
    if args.minutes is None and args.programs is None and args.replay is None:
        args.minutes = 5.0
    return args


class Progress:
    """Runs programs, prints a line for each, and knows when it is time to stop."""

    def __init__(self, fleet: Fleet, console: Console, minutes: float | None, count: int | None):
        self.fleet, self._console = fleet, console
        self._begin = time.monotonic()
        self._minutes, self._count = minutes, count

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def is_over(self) -> bool:
        """Of the two limits there is one, or none."""
        if self._count is not None:
            return self.fleet.totals["programs"] >= self._count
        return self._minutes is not None and self.seconds > 60 * self._minutes

    def examine(self, program: Program) -> list[str]:
        begin = time.monotonic()
        problems = self.fleet.examine(program)
        self._console.log(
            f"program {self.fleet.totals['programs']}: {len(program.requests())} requests in "
            f"{len(program.waves)} waves, {time.monotonic() - begin:.1f} s: {'FAILED' if problems else 'ok'}",
            highlight=False,
        )
        return problems


class Failure(NamedTuple):
    """A program and what was wrong with it."""

    program: Program
    problems: list[str]


def soak(args: argparse.Namespace, progress: Progress) -> Failure | None:
    """Run what was asked for, to the first program that fails."""
    if args.replay:
        programs = itertools.repeat(Program.from_json(args.replay.read_text()), args.repeat)
    else:
        programs = (make_program(args.seed, number) for number in itertools.count())
    for program in itertools.takewhile(lambda _: not progress.is_over(), programs):
        problems = progress.examine(program)
        if problems:
            return Failure(program, problems)
    return None


def smallest(failure: Failure, progress: Progress, max_tries: int) -> Failure:
    """The smallest part of a failing program that fails, as long as the servers live."""
    found = [failure]

    def fails(program: Program) -> bool:
        problems = progress.examine(program) if progress.fleet.is_running() else []
        if problems:
            found.append(Failure(program, problems))
        return bool(problems)

    shrink(failure.program, fails, max_tries)
    return found[-1]


def lost_recall(fleet: Fleet) -> list[str]:
    """What is wrong with the compressed server's answers on the whole."""
    if "compressed" not in fleet.recalled:
        return []
    dense, compressed = fleet.recalled["dense"], fleet.recalled["compressed"]
    if dense["total"] < 100 or compressed["total"] < 100:
        return []
    rates = [counts["right"] / counts["total"] for counts in (dense, compressed)]
    return [f"compressed: {rates[1]:.3f} right, dense {rates[0]:.3f}"] if rates[1] < rates[0] - LOST_RECALL else []


def summarize(args: argparse.Namespace, progress: Progress, failure: Failure | None) -> dict[str, Any]:
    """What was done and found; servers that are gone say nothing."""
    fleet = progress.fleet
    counters = fleet.counters() if fleet.is_running() else {}
    return {
        "seed": args.seed,
        "request_limit_s": args.request_limit,
        "server_args": args.server_args,
        "seconds": round(progress.seconds),
        "done": dict(fleet.totals),
        "servers": {name: counts | {"recall": dict(fleet.recalled[name])} for name, counts in counters.items()},
        "problems": (failure.problems if failure else []) + lost_recall(fleet),
    }


def make_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['done'].get('programs', 0)} programs in {summary['seconds']} s")
    table.add_column("")
    for name in summary["servers"]:
        table.add_column(name, justify="right")
    for counter in (*COUNTERS, "recall"):
        values = [counts[counter] for counts in summary["servers"].values()]
        table.add_row(counter, *(f"{v['right']}/{v['total']}" if counter == "recall" else f"{v:,}" for v in values))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    servers = {name: make_server(name, args.server_args, args.request_limit) for name in args.servers}
    console.log(f"starting {', '.join(servers)}")
    with running(servers.values()):
        progress = Progress(Fleet(servers), console, args.minutes, args.programs)
        failure = soak(args, progress)
        if failure:
            failure = smallest(failure, progress, args.shrink)
            args.failure.write_text(failure.program.to_json() + "\n")
            console.log(f"the program that failed is in {args.failure}")
        summary = summarize(args, progress, failure)
    console.print(make_table(summary))
    console.print(json.dumps(summary["done"]), *summary["problems"], sep="\n", highlight=False, markup=False)
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
