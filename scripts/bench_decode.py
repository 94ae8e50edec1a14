"""Time decode attention over compressed rows against dense attention on the same tokens.

On a CPU: against SGLang's torch_native path, one layer, in turn, medians.

    python scripts/bench_decode.py --device cpu
    python scripts/bench_decode.py --device cpu --key-ratio 0.9 --restore-bits 2 --value-dtype float8_e4m3fn

On a GPU: first every kernel's result against the reference, where a wrong one ends the run. Then, for the three
standard settings, decode against FlashInfer's paged decode (bfloat16, float8), SGLang's Triton kernel and a device
copy, in CUDA graphs, and what rows cost a prefill.

    python scripts/bench_decode.py --device cuda --json decode.json --plot decode.png
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console

from decode_bench import checks, cpu, cuda, prefill, report
from decode_bench.settings import STANDARD_SETTINGS, VALUE_DTYPES, Heads, Setting, Shape

# By device: tokens per request, batches, query heads, KV heads (the GPU's are Llama-3.1-8B's), seconds per timing.
DEFAULTS = {
    "cpu": {
        "seq_lens": [512, 1024, 2048, 4096, 8192, 16384],
        "batches": [1, 4],
        "num_qo_heads": 8,
        "num_kv_heads": 2,
        "seconds": 2.0,
    },
    "cuda": {
        "seq_lens": [1024, 8192, 32768, 131072],
        "batches": [1, 4, 16, 64],
        "num_qo_heads": 32,
        "num_kv_heads": 8,
        "seconds": 0.1,
    },
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--key-ratio", type=float, help="share of key channels not kept, 0: whole keys; default: 0.96")
    parser.add_argument("--restore-bits", type=float, help="bits per channel on average; default: 3")
    parser.add_argument(
        "--value-dtype",
        choices=VALUE_DTYPES,
        help="default: int4; on a GPU, if none of these three is given, the three recipes of the README in turn",
    )
    parser.add_argument("--seq-lens", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--batches", type=int, nargs="+", metavar="REQUESTS")
    parser.add_argument("--num-qo-heads", type=int)
    parser.add_argument("--num-kv-heads", type=int)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32, help="CPU: layers that a step goes through")
    parser.add_argument("--threads", type=int, help="CPU: default is PyTorch's own choice")
    parser.add_argument("--seconds", type=float, help="to spend on each shape (CPU) or timing (GPU)")
    parser.add_argument("--time-limit", type=float, default=420.0, help="GPU: seconds after which shapes are left out")
    parser.add_argument(
        "--check-only", action="store_true", help="check results and stop; with TRITON_INTERPRET=1 without a GPU too"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows of the tables as JSON")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="GPU: draw decode times, to .png, .svg or .pdf")
    args = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available()
    args.device = args.device or ("cuda" if has_gpu else "cpu")
    if args.device == "cuda" and not has_gpu:
        parser.error("--device cuda: PyTorch finds no GPU here; use --device cpu")
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("seq_lens", "batches"):
        if min(getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {min(getattr(args, name))}")
    if args.num_kv_heads < 1 or args.num_qo_heads < 1 or args.num_qo_heads % args.num_kv_heads:
        parser.error(
            f"--num-qo-heads {args.num_qo_heads} must be a positive multiple of --num-kv-heads {args.num_kv_heads}"
        )
    if args.plot and args.device == "cpu":
        parser.error("--plot draws the times of --device cuda only")
    if args.plot and not report.can_plot():
        parser.error("--plot needs matplotlib, which is not installed")
    args.settings = settings(args)
    try:
        for setting in args.settings:
            setting.key_format(args.head_dim), setting.value_format(args.head_dim)
    except ValueError as error:
        parser.error(str(error))
    return args


def settings(args: argparse.Namespace) -> list[Setting]:
    """The setting asked for, or on a GPU, if none is, the standard ones."""
    names = ("key_ratio", "restore_bits", "value_dtype")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return list(STANDARD_SETTINGS) if args.device == "cuda" and not given else [Setting(**given)]


def packages(*names: str) -> str:
    """Those that are installed, with their versions."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    heads = Heads(args.num_qo_heads, args.num_kv_heads, args.head_dim)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        if args.check_only:
            check(args, heads, console)
        elif args.device == "cpu":
            on_cpu(args, heads, console)
        else:
            on_cuda(args, heads, console)
    except checks.WrongResult as error:
        print(f"wrong result: {error}", file=sys.stderr)
        return 1
    return 0


def check(args: argparse.Namespace, heads: Heads, console: Console) -> dict[str, str]:
    """Correctness; returns the dense kernels that are not there, and why."""
    lengths = checks.GPU_LENGTHS if args.device == "cuda" else checks.INTERPRETED_LENGTHS
    log = lambda line: console.print(line, highlight=False)  # noqa: E731
    return checks.check_all(heads, args.settings, torch.device(args.device), lengths, log)


def on_cpu(args: argparse.Namespace, heads: Heads, console: Console) -> None:
    (setting,) = args.settings
    about = {
        "cpu": cpu.cpu_model(),
        "threads": torch.get_num_threads(),
        "packages": packages("sglang", "torch", "numba"),
        "key_format": str(setting.key_format(heads.head_dim)),
        "value_dtype": setting.value_dtype,
        "heads": str(heads),
    }
    _print(console, about)
    shapes = [Shape(batch, seq_len) for batch, seq_len in itertools.product(args.batches, args.seq_lens)]
    rows = cpu.measure(shapes, heads, setting, args.layers, args.seconds)
    console.print(report.cpu_table(rows))
    if args.json:
        report.write_json(args.json, rows, about)


def on_cuda(args: argparse.Namespace, heads: Heads, console: Console) -> None:
    deadline = time.monotonic() + args.time_limit
    device = torch.device("cuda", torch.cuda.current_device())
    about = {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "packages": packages("sglang", "torch", "triton", "flashinfer-python", "sglang-kernel"),
        "heads": str(heads),
    }
    _print(console, about)
    missing = check(args, heads, console)
    log = lambda line: console.log(line, highlight=False)  # noqa: E731
    prefill_rows = prefill.measure(heads, args.settings, device, missing, args.seconds)
    shapes = [Shape(batch, seq_len) for batch, seq_len in itertools.product(args.batches, args.seq_lens)]
    rows = cuda.measure(shapes, heads, args.settings, device, missing, args.seconds, deadline, log)
    console.print(report.decode_table(rows), report.prefill_table(prefill_rows))
    if args.json:
        kinds = [row | {"kind": "decode"} for row in rows] + [row | {"kind": "prefill"} for row in prefill_rows]
        report.write_json(args.json, kinds, about)
    if args.plot:
        report.plot(args.plot, rows, about["gpu"])


def _driver() -> str:
    """Version of the GPU's driver, and of CUDA that PyTorch was built for."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return f"{driver}, CUDA {torch.version.cuda}"


def _print(console: Console, about: dict[str, object]) -> None:
    for name, value in about.items():
        console.print(f"{name}: {value}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
