#!/usr/bin/env python3
"""Overload a dense server and compressed ones that have the same memory for their KV caches, and compare.

One server after the other, each with --budget MiB of cache, serves two workloads:

multi-turn      users that ask about documents of their own, in rounds; the same prompts for every server
bench-serving   SGLang's own benchmark with random token ids and long answers (needs the package datasets)

Both are sized so that the dense cache overflows: cached conversations are evicted, and running requests retracted.

    python scripts/bench_load.py --json load.json --plot load.png
    python scripts/bench_load.py --device cpu --servers dense spark --workloads multi-turn

On a GPU the model is Llama-3.1-8B's configuration with dummy weights, and conversations are random ids; on a CPU it is
the recall model, whose answers are checked.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from decode_bench.cpu import cpu_model  # noqa: E402
from load_bench import counters, random_traffic, report, workloads  # noqa: E402
from load_bench.budget import Capacity, capacities, pool_bytes  # noqa: E402
from load_bench.conversations import Request, Shape, make_requests  # noqa: E402
from load_bench.random_traffic import RandomTraffic  # noqa: E402
from load_bench.servers import SERVERS, model_flags, model_folder  # noqa: E402
from load_bench.workloads import BENCH_SERVING, MULTI_TURN, WORKLOADS  # noqa: E402
from local_server import LocalServer  # noqa: E402

# By device: MiB of cache; users, turns, tokens of the common prompt, of a document and of a reply, requests at once;
# then the other workload's requests and tokens.
DEFAULTS = {
    "cuda": {
        "budget": 16384.0,
        "users": 64,
        "turns": 5,
        "system_len": 512,
        "document_len": 2048,
        "reply_len": 256,
        "concurrency": 56,
        "num_prompts": 120,
        "input_len": 512,
        "output_len": 1024,
    },
    "cpu": {
        "budget": 32.0,
        "users": 24,
        "turns": 5,
        "system_len": 128,
        "document_len": 384,
        "reply_len": 128,
        "concurrency": 18,
        "num_prompts": 36,
        "input_len": 64,
        "output_len": 256,
    },
}
# Requests are taken up although their answers may not fit; at SGLang's default of 1 more of them wait instead.
CONSERVATIVENESS = ("--schedule-conservativeness", "0.1")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS), help="in this order")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--model-path", help="a model instead of the dummy one (on a CPU: the recall model)")
    parser.add_argument("--budget", type=float, metavar="MIB", help="memory of each server's KV cache, per process")
    for name, meaning in {
        "users": "conversations",
        "turns": "questions in each",
        "system-len": "tokens of the system prompt that all share",
        "document-len": "tokens of each document",
        "reply-len": "tokens generated in each turn",
        "concurrency": "turns under way at once",
        "num-prompts": "requests of bench-serving",
        "input-len": "tokens of their prompts",
        "output-len": "tokens of their answers",
    }.items():
        defaults = (DEFAULTS[device][name.replace("-", "_")] for device in ("cuda", "cpu"))
        parser.add_argument(f"--{name}", type=int, help="{}; default: {}; on a CPU {}".format(meaning, *defaults))
    parser.add_argument("--max-concurrency", type=int, help="requests of bench-serving under way at once; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows of the tables as JSON")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw hit rates, retractions and throughput")
    parser.add_argument("--page", type=Path, metavar="PATH", help="replace the tables of a page such as load.md")
    parser.add_argument("server_args", nargs="*", metavar="-- SERVER_ARGUMENT", help="more flags for every server")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; use --device cpu")
    if BENCH_SERVING in args.workloads and not random_traffic.is_available():
        parser.error(f"{random_traffic.NEEDS_DATASETS}, or use --workloads {MULTI_TURN}")
    if args.plot and not report.can_plot():
        parser.error("--plot needs matplotlib, which is not installed")
    if args.page and not all(report.has_table(args.page, workload) for workload in args.workloads):
        parser.error(f"--page {args.page}: must be a page with the tables of {' and '.join(args.workloads)}")
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    return args


def common_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """What all servers have in common, the user's flags last so that they win."""
    flags = model_flags(args.model_path, args.device, args.seed)
    return (*flags, *counters.FLAGS, *CONSERVATIVENESS, *args.server_args)


def measure(
    args: argparse.Namespace, name: str, capacity: Capacity, model: str, requests: Sequence[Request], eos: str
) -> list[dict[str, Any]]:
    """The rows of one server, one per workload."""
    flags = (*common_flags(args), *SERVERS[name], "--max-total-tokens", str(capacity.tokens))
    with LocalServer(*flags, model=model) as server:
        about = {
            "server": name,
            "flags": " ".join(flags),
            "pool_bytes": pool_bytes(server, capacity, args.budget),
            "pool_tokens": capacity.tokens,
            "bytes_per_token": capacity.bytes_per_token,
        }
        rows = []
        if MULTI_TURN in args.workloads:
            rows.append(workloads.multi_turn(server, requests, args.reply_len, args.concurrency, eos))
        if BENCH_SERVING in args.workloads:
            sizes = (args.num_prompts, args.input_len, args.output_len)
            traffic = RandomTraffic(*sizes, args.seed, args.max_concurrency)
            rows.append(workloads.bench_serving(server, traffic))
    return [about | row for row in rows]


def describe(args: argparse.Namespace) -> dict[str, str]:
    """Where and with what this runs."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{cpu_model()}, {os.cpu_count()} cores"
    packages = ", ".join(f"{name} {version(name)}" for name in ("sglang", "torch"))
    sizes = {name: getattr(args, name) for name in DEFAULTS[args.device]}
    return {
        "device": device,
        "packages": packages,
        "sizes": ", ".join(f"{name} {value:g}" for name, value in sizes.items()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    about, rows = describe(args), []
    with model_folder(args.model_path, args.device) as model:
        tokenizer = AutoTokenizer.from_pretrained(model)
        shape = Shape(args.users, args.turns, args.system_len, args.document_len, args.reply_len, args.seed)
        requests = make_requests(tokenizer, shape)
        found = capacities(args.servers, model, common_flags(args), args.budget)
        for name in args.servers:
            console.log(f"{name}: {found[name].tokens:,} tokens in {args.budget:g} MiB", highlight=False)
            rows += measure(args, name, found[name], model, requests, tokenizer.eos_token)
            # After each server: what was measured is kept if a later one fails.
            if args.json:
                report.write_json(args.json, rows, about)
    console.print(*report.make_tables(rows))
    for row in rows:
        for error in row["errors"]:
            console.print(f"{row['server']}, {row['workload']}: {error}", highlight=False, markup=False)
    if args.plot:
        report.plot(args.plot, rows, f"{args.budget:g} MiB of KV cache, {about['device']}")
    if args.page:
        report.write_page(args.page, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
