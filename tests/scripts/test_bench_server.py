"""scripts/bench_server.py without its servers: arguments, flags, and what is kept of a result."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

import bench_server
from load_bench.random_traffic import RandomTraffic


@pytest.fixture(autouse=True)
def a_gpu_and_datasets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "datasets" or find_spec(name))


def _arguments(*argv: str) -> argparse.Namespace:
    return bench_server.parse_arguments(argv)


def test_defaults_by_device():
    gpu, cpu = _arguments(), _arguments("--device", "cpu", "--input-len", "9")
    assert (gpu.num_prompts, gpu.input_len, gpu.output_len, gpu.servers) == (256, 4096, 512, ["dense", "spark"])
    assert (cpu.num_prompts, cpu.input_len, cpu.output_len) == (4, 9, 8)


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--num-prompts", "0"], "--num-prompts must be positive, got 0"), (["--servers", "sparse"], "invalid choice")],
)
def test_bad_arguments(capsys, argv, message):
    with pytest.raises(SystemExit) as exit:
        _arguments(*argv)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu_or_datasets_it_says_so_and_starts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        _arguments()
    assert exit.value.code == 2
    assert "--device cuda: PyTorch finds no GPU here; use --device cpu" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit:
        _arguments("--device", "cpu")
    assert exit.value.code == 2
    assert "sglang.bench_serving needs the package datasets" in capsys.readouterr().err


def test_flags():
    args = _arguments("--", "--tp", "2")
    assert bench_server.server_flags(args, "spark-small") == (
        *("--random-seed", "0", "--load-format", "dummy"),
        *("--kv-compress", "spark", "--spark-restore-bits", "2", "--spark-value-dtype", "int3", "--tp", "2"),
    )
    assert "--kv-compress" not in bench_server.server_flags(args, "dense")
    assert "dummy" not in bench_server.server_flags(_arguments("--model-path", "x"), "dense")
    assert "--max-total-tokens" in bench_server.server_flags(_arguments("--device", "cpu"), "dense")


def test_traffic_is_what_was_asked_for():
    traffic = bench_server.traffic(_arguments("--num-prompts", "7", "--max-concurrency", "3", "--seed", "5"))
    assert traffic == RandomTraffic(7, input_len=4096, output_len=512, seed=5, max_concurrency=3)


def _result(**changes) -> dict:
    numbers = dict.fromkeys(bench_server.NUMBERS, 1234.56) | {"max_concurrent_requests": 5}
    return {"completed": 256, "server_info": {"max_total_num_tokens": 400000}, **numbers, **changes}


def test_a_row_and_its_table():
    args = _arguments()
    row = bench_server.summarize(args, "spark", ("--kv-compress", "spark"), _result())
    assert row["max_total_tokens"] == 400000 and row["output_throughput"] == 1234.56
    console = Console(width=200, record=True, file=Path(os.devnull).open("w"))
    console.print(bench_server.make_table([row]))
    text = console.export_text()
    assert "400,000" in text and "1,234.6" in text and "spark" in text


def test_requests_that_failed_are_not_passed_over():
    with pytest.raises(RuntimeError, match="spark: 250 of 256 requests were answered"):
        bench_server.summarize(_arguments(), "spark", (), _result(completed=250))
