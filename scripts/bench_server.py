#!/usr/bin/env python3
"""Serve the same traffic from the dense cache and from SparK, one server after the other, and compare.

The model is Llama-3.1-8B's configuration with dummy weights and a made-up tokenizer: nothing is downloaded, and what it
says is meaningless, but it computes what the real one computes. Traffic is SGLang's own benchmark
(``sglang.bench_serving``, random token ids), as fast as the server takes it unless --max-concurrency says otherwise.

    python scripts/bench_server.py --json server.json
    python scripts/bench_server.py --servers dense-fp8 spark-accurate spark-small
    python scripts/bench_server.py --model-path meta-llama/Llama-3.1-8B-Instruct -- --load-format auto --tp 2
    python scripts/bench_server.py --device cpu

On a CPU, a few short requests to the recall model: to see that it works, not how fast a GPU would be.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from load_bench import random_traffic  # noqa: E402
from load_bench.random_traffic import RandomTraffic  # noqa: E402
from load_bench.servers import SERVERS, model_flags, model_folder  # noqa: E402
from local_server import LocalServer  # noqa: E402

# By device: requests, tokens of each prompt and answer.
DEFAULTS = {
    "cuda": {"num_prompts": 256, "input_len": 4096, "output_len": 512},
    "cpu": {"num_prompts": 4, "input_len": 64, "output_len": 8},
}
# Of the benchmark's results, in the order of the table.
NUMBERS = (
    "output_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_itl_ms",
    "p99_itl_ms",
    "max_concurrent_requests",
    "duration",
)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=["dense", "spark"], help="in this order")
    parser.add_argument("--model-path", help="a model instead of the dummy one (on a CPU: the recall model)")
    parser.add_argument("--num-prompts", type=int, help="default: 256; on a CPU 4")
    parser.add_argument("--input-len", type=int, help="tokens of each prompt; default: 4096; on a CPU 64")
    parser.add_argument("--output-len", type=int, help="tokens of each answer; default: 512; on a CPU 8")
    parser.add_argument("--max-concurrency", type=int, help="requests under way at once; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows of the table as JSON")
    parser.add_argument("server_args", nargs="*", metavar="-- SERVER_ARGUMENT", help="more flags for every server")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; use --device cpu")
    if not random_traffic.is_available():
        parser.error(random_traffic.NEEDS_DATASETS)
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    return args


def server_flags(args: argparse.Namespace, name: str) -> tuple[str, ...]:
    """Flags of one server, the user's last so that they win."""
    common = model_flags(args.model_path, args.device, args.seed)
    if args.device == "cpu":
        common += ("--max-total-tokens", "16384")
    return (*common, *SERVERS[name], *args.server_args)


def traffic(args: argparse.Namespace) -> RandomTraffic:
    return RandomTraffic(args.num_prompts, args.input_len, args.output_len, args.seed, args.max_concurrency)


def measure(args: argparse.Namespace, name: str, model: str) -> dict[str, Any]:
    """A row of the results: one server's.

    Raises
    ------
    RuntimeError
        The benchmark failed, or requests did.
    """
    flags = server_flags(args, name)
    with LocalServer(*flags, model=model) as server:
        return summarize(args, name, flags, traffic(args).run(server.url, model))


def summarize(args: argparse.Namespace, name: str, flags: Sequence[str], result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the benchmark's ``result``."""
    if result["completed"] != args.num_prompts:
        raise RuntimeError(f"{name}: {result['completed']} of {args.num_prompts} requests were answered")
    return {
        "server": name,
        "flags": " ".join(flags),
        "num_prompts": args.num_prompts,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "max_concurrency": args.max_concurrency,
        "max_total_tokens": result["server_info"]["max_total_num_tokens"],
        **{number: result[number] for number in NUMBERS},
    }


def make_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="The same traffic, one server after the other")
    table.add_column("server")
    names = ("output tokens/s", "TTFT ms, median", "p99", "ITL ms, median", "p99", "most requests at once", "seconds")
    for name in ("tokens that fit", *names):
        table.add_column(name, justify="right")
    for row in rows:
        numbers = (f"{row[name]:,.1f}" if isinstance(row[name], float) else str(row[name]) for name in NUMBERS)
        table.add_row(row["server"], f"{row['max_total_tokens']:,}", *numbers)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows = []
    with model_folder(args.model_path, args.device) as model:
        for name in args.servers:
            console.log(f"{name}: {' '.join(server_flags(args, name))}", highlight=False)
            rows.append(measure(args, name, model))
    console.print(make_table(rows))
    if args.json:
        about = {"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {}
        args.json.write_text(json.dumps([row | about for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
