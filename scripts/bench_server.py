#!/usr/bin/env python3
"""Serve the same traffic from the dense cache and from SparK, one server after the other, and compare.

The model is Llama-3.1-8B's configuration with dummy weights and a made-up tokenizer: nothing is downloaded, and what it
says is meaningless, but it computes what the real one computes. Traffic is SGLang's own benchmark
(``sglang.bench_serving``, random token ids), as fast as the server takes it unless --max-concurrency says otherwise.

    python scripts/bench_server.py --json server.json
    python scripts/bench_server.py --servers dense-fp8 spark-fp8 spark-int4
    python scripts/bench_server.py --model-path meta-llama/Llama-3.1-8B-Instruct -- --load-format auto --tp 2
    python scripts/bench_server.py --device cpu

On a CPU, a few short requests to the recall model: to see that it works, not how fast a GPU would be.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from local_server import RECALL_MODEL, LocalServer  # noqa: E402

_SPARK = ("--kv-compress", "spark")
_FP8 = ("--kv-cache-dtype", "fp8_e4m3")
SERVERS = {
    "dense": (),
    "dense-fp8": _FP8,
    "spark": _SPARK,
    "spark-fp8": (*_SPARK, *_FP8),
    "spark-int4": (*_SPARK, "--spark-value-dtype", "int4"),
}
# By device: requests, tokens of each prompt and answer.
DEFAULTS = {
    "cuda": {"num_prompts": 256, "input_len": 4096, "output_len": 512},
    "cpu": {"num_prompts": 4, "input_len": 64, "output_len": 8},
}
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "dtype": "bfloat16",
    "eos_token_id": 128001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "vocab_size": 128256,
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
    # Of SGLang's dependencies, one that its servers do not need.
    if importlib.util.find_spec("datasets") is None:
        parser.error("sglang.bench_serving needs the package datasets, which is not installed: pip install datasets")
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    return args


def make_dummy_model(folder: Path) -> None:
    """Configuration and tokenizer of a model without weights: one word per token of Llama-3.1-8B's vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.joinpath("config.json").write_text(json.dumps(LLAMA_3_1_8B, indent=1))
    words = {f"t{number}": number for number in range(LLAMA_3_1_8B["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bos, eos = (f"t{LLAMA_3_1_8B[name]}" for name in ("bos_token_id", "eos_token_id"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token="t0",
        model_max_length=LLAMA_3_1_8B["max_position_embeddings"],
    ).save_pretrained(folder)


def server_flags(args: argparse.Namespace, name: str) -> tuple[str, ...]:
    """Flags of one server, the user's last so that they win."""
    common: tuple[str, ...] = ("--random-seed", str(args.seed))
    if args.device == "cpu":
        common += ("--device", "cpu", "--max-total-tokens", "16384")
    elif args.model_path is None:
        common += ("--load-format", "dummy")
    return (*common, *SERVERS[name], *args.server_args)


def traffic_command(args: argparse.Namespace, url: str, model: str, output: Path) -> list[str]:
    """The benchmark's command line: every request has as many tokens as asked for."""
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url]
    command += ["--model", model, "--dataset-name", "random-ids", "--tokenize-prompt", "--random-range-ratio", "1.0"]
    command += ["--num-prompts", str(args.num_prompts), "--random-input-len", str(args.input_len)]
    command += ["--random-output-len", str(args.output_len), "--seed", str(args.seed), "--flush-cache"]
    if args.max_concurrency:
        command += ["--max-concurrency", str(args.max_concurrency)]
    return [*command, "--disable-tqdm", "--output-file", str(output)]


def measure(args: argparse.Namespace, name: str, model: str) -> dict[str, Any]:
    """A row of the results: one server's.

    Raises
    ------
    RuntimeError
        The benchmark failed, or requests did.
    """
    flags = server_flags(args, name)
    with LocalServer(*flags, model=model) as server, tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "traffic.jsonl"
        command = traffic_command(args, server.url, model, output)
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not output.exists():
            raise RuntimeError(f"{' '.join(command)} failed:\n{(result.stdout + result.stderr)[-4000:]}")
        return summarize(args, name, flags, json.loads(output.read_text().splitlines()[-1]))


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
    with tempfile.TemporaryDirectory() as folder:
        model = args.model_path or str(RECALL_MODEL)
        if args.model_path is None and args.device == "cuda":
            make_dummy_model(Path(folder))
            model = folder
        rows = []
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
