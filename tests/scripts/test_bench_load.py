"""scripts/bench_load.py: arguments, and the multi-turn workload against a dense server and a compressed one."""

from __future__ import annotations

import argparse
import importlib.util
import json

import pytest
import torch

import bench_load
from load_bench.budget import MIB, Capacity

SPARK = ("--kv-compress", "spark")
BUDGET = 16


@pytest.fixture
def packages(monkeypatch):
    """A GPU, and which of the packages besides SGLang's there are."""
    there = {"datasets", "matplotlib"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (name in there or None) if name in ("datasets", "matplotlib") else find_spec(name),
    )
    return there


def _arguments(*argv: str) -> argparse.Namespace:
    return bench_load.parse_arguments(argv)


def test_defaults_by_device(packages):
    gpu, cpu = _arguments(), _arguments("--device", "cpu", "--users", "3", "--budget", "1.5")
    assert (gpu.budget, gpu.users, gpu.output_len) == (16384, 64, 1024)
    assert gpu.servers == ["dense", "dense-fp8", "spark-accurate", "spark", "spark-small"]
    assert gpu.workloads == ["multi-turn", "bench-serving"]
    assert (cpu.budget, cpu.users, cpu.turns) == (1.5, 3, bench_load.DEFAULTS["cpu"]["turns"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--budget", "0"], "--budget must be positive, got 0"),
        (["--document-len", "-1"], "--document-len must be positive, got -1"),
        (["--servers", "sparse"], "invalid choice"),
        (["--workloads", "chat"], "invalid choice"),
        (["--page", "no.md"], "--page no.md: must be a page with the tables of multi-turn and bench-serving"),
        (["--page", "README.md", "--workloads", "multi-turn"], "must be a page with the tables of multi-turn"),
    ],
)
def test_bad_arguments(packages, capsys, argv, message):
    with pytest.raises(SystemExit) as exit:
        _arguments(*argv)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_what_is_missing_is_named_before_a_server_starts(packages, monkeypatch, capsys):
    packages.clear()
    for argv, message in (
        ([], "needs the package datasets, which is not installed: pip install datasets, or use --workloads multi-turn"),
        (["--workloads", "multi-turn", "--plot", "x.png"], "--plot needs matplotlib, which is not installed"),
    ):
        with pytest.raises(SystemExit):
            _arguments(*argv)
        assert message in capsys.readouterr().err
    assert _arguments("--workloads", "multi-turn").workloads == ["multi-turn"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        _arguments()
    assert "--device cuda: PyTorch finds no GPU here; use --device cpu" in capsys.readouterr().err


def test_servers_differ_in_their_caches_only(packages, monkeypatch):
    started = []

    class Server:
        def __init__(self, *flags, model):
            started.append(flags)

        def __enter__(self):
            return self

        def __exit__(self, *exception): ...

    monkeypatch.setattr(bench_load, "LocalServer", Server)
    monkeypatch.setattr(bench_load, "pool_bytes", lambda server, capacity, budget: 77)
    monkeypatch.setattr(bench_load.workloads, "multi_turn", lambda *args: {"workload": "multi-turn"})
    args = _arguments("--workloads", "multi-turn", "--", "--page-size", "16")
    (row,) = bench_load.measure(args, "dense", Capacity(100, 4096), "model", [], "")
    bench_load.measure(args, "spark", Capacity(149, 2752), "model", [], "")
    assert (row["server"], row["pool_bytes"], row["pool_tokens"], row["bytes_per_token"]) == ("dense", 77, 100, 4096)
    dense, spark = started
    assert dense[-2:] == ("--max-total-tokens", "100") and spark[-2:] == ("--max-total-tokens", "149")
    assert spark[:-2] == (*dense[:-2], *SPARK) and dense[-4:-2] == ("--page-size", "16")


def test_spark_keeps_more_of_the_conversations_in_the_same_memory(tmp_path):
    """A cache that is too small for the dense server's: it evicts what comes back, and retracts what runs."""
    output = tmp_path / "load.json"
    sizes = f"--budget {BUDGET} --users 14 --turns 3 --document-len 256 --reply-len 192 --concurrency 10"
    servers = "--device cpu --servers dense spark --workloads multi-turn"
    bench_load.main([*servers.split(), *sizes.split(), "--json", str(output)])
    dense, spark = json.loads(output.read_text())
    page = 4096
    assert all(0 < row["pool_bytes"] - BUDGET * MIB <= page for row in (dense, spark))
    assert (dense["pool_tokens"], spark["pool_tokens"]) == (4096, 15420)
    assert (dense["completed"], spark["completed"]) == (42, 42)
    assert dense["prompt_tokens"] == spark["prompt_tokens"]
    assert dense["evicted_tokens"] > spark["evicted_tokens"]
    assert spark["hit_rate"] > dense["hit_rate"] + 0.05
    assert spark["retractions"] < dense["retractions"]
    assert spark["right"] >= dense["right"] - 0.1
