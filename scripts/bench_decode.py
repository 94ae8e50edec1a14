"""Time decode attention over compressed rows against SGLang's dense torch_native path, on this CPU.

Both read the same tokens at the same shuffled slots: one layer, a dense bfloat16 pool on SGLang's side, rows on ours.
For each shape the two alternate, and medians are reported.

    python scripts/bench_decode.py
    python scripts/bench_decode.py --key-ratio 0.83 --restore-bits 1 --value-dtype float8_e4m3fn --json decode.json
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import spark_kernels as sk

# Of dense copies of layers that one shape may take.
MOST_BYTES = 2 << 30


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--key-ratio", type=float, default=0.8, help="share of key channels dropped, 0: raw keys")
    parser.add_argument("--restore-bits", type=int, default=2, choices=(0, 1, 2))
    parser.add_argument(
        "--value-dtype", default="bfloat16", choices=("bfloat16", "float16", "float32", "float8_e4m3fn", "int4")
    )
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--num-qo-heads", type=int, default=8)
    parser.add_argument("--num-kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32, help="layers that a step goes through")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on each shape")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows of the table as JSON")
    return parser.parse_args()


def value_format(args: argparse.Namespace) -> sk.ValueFormat | sk.Int4ValueFormat:
    if args.value_dtype == "int4":
        return sk.Int4ValueFormat(args.head_dim)
    return sk.ValueFormat(args.head_dim, getattr(torch, args.value_dtype))


class Shape:
    """One decode step over ``batch`` requests of ``seq_len`` tokens in every layer, ready to run both ways.

    Each call takes the next layer, as a step does, so a layer's cache has left the CPU's near caches when its turn
    comes again. Random content serves all layers: the copies differ in where they are.
    """

    def __init__(self, args: argparse.Namespace, batch: int, seq_len: int) -> None:
        tokens = batch * seq_len
        self.sm_scale = args.head_dim**-0.5
        self.q = torch.randn(batch, args.num_qo_heads, args.head_dim, dtype=torch.bfloat16)
        self.slots = torch.randperm(tokens + 1)[:tokens]
        k_cache, v_cache = torch.randn(2, tokens + 1, args.num_kv_heads, args.head_dim, dtype=torch.bfloat16)
        rows = sk.LayerRows.allocate(
            tokens + 1,
            args.num_kv_heads,
            sk.KeyFormat.from_ratio(args.head_dim, args.key_ratio, args.restore_bits),
            value_format(args),
        )
        queries = torch.randn(tokens, args.num_qo_heads, args.head_dim, dtype=torch.bfloat16)
        sk.write_rows(queries, k_cache[self.slots], v_cache[self.slots], self.slots, rows)
        layers = min(args.layers, max(1, MOST_BYTES // (k_cache.nbytes + v_cache.nbytes)))
        self.dense_layers = itertools.cycle([(k_cache.clone(), v_cache.clone()) for _ in range(layers)])
        self.spark_layers = itertools.cycle(
            [dataclasses.replace(rows, keys=rows.keys.clone(), values=rows.values.clone()) for _ in range(layers)]
        )
        self.layers = layers
        self.wrapper = sk.SparkBatchDecodeWrapper("cpu")
        kv_indptr = torch.arange(0, tokens + 1, seq_len, dtype=torch.int32)
        self.wrapper.plan(kv_indptr, self.slots, args.num_qo_heads, args.num_kv_heads, args.head_dim)
        self.req_to_token = self.slots.view(batch, seq_len).to(torch.int32)
        self.seq_lens = torch.full((batch,), seq_len)
        self.enable_gqa = args.num_kv_heads != args.num_qo_heads
        self.dense_forward = _sglang_forward()

    def spark(self) -> torch.Tensor:
        return self.wrapper.run(self.q, next(self.spark_layers), sm_scale=self.sm_scale)

    def dense(self) -> torch.Tensor:
        return self.dense_forward(
            self.q,
            torch.empty_like(self.q),
            *next(self.dense_layers),
            self.req_to_token,
            torch.arange(self.q.shape[0]),
            self.seq_lens,
            scaling=self.sm_scale,
            enable_gqa=self.enable_gqa,
        )


def _sglang_forward() -> Callable[..., torch.Tensor]:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    # The method uses nothing of its instance except a static helper, so no model runner is needed.
    return TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)._run_sdpa_forward_decode


def alternate(first: Callable[[], object], second: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median milliseconds of each, run in turn for ``seconds`` after a warm-up of both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(2):
        first()
        second()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for measured, function in zip(times, (first, second), strict=True):
            start = time.perf_counter()
            function()
            measured.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    packages = ", ".join(f"{name} {version(name)}" for name in ("sglang", "torch", "numba"))
    settings = {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "packages": packages,
        "key_format": str(sk.KeyFormat.from_ratio(args.head_dim, args.key_ratio, args.restore_bits)),
        "value_format": str(value_format(args)),
        "heads": f"{args.num_qo_heads} query, {args.num_kv_heads} KV, head_dim {args.head_dim}",
    }
    console = Console()
    for name, value in settings.items():
        console.print(f"{name}: {value}", highlight=False)
    table = Table("batch", "tokens", "spark ms", "dense ms", "ratio", title="Decode attention, one layer")
    results = []
    for batch in args.batches:
        for seq_len in args.seq_lens:
            shape = Shape(args, batch, seq_len)
            spark_ms, dense_ms = alternate(shape.spark, shape.dense, args.seconds)
            ratio = dense_ms / spark_ms
            table.add_row(str(batch), str(seq_len), f"{spark_ms:.3f}", f"{dense_ms:.3f}", f"{ratio:.1f}")
            results.append(
                {
                    "seq_len": seq_len,
                    "batch": batch,
                    "spark_ms": spark_ms,
                    "dense_ms": dense_ms,
                    "ratio": ratio,
                    **settings,
                }
            )
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
