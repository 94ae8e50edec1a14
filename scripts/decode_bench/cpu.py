"""Decode over rows against SGLang's torch_native path, on a CPU."""

from __future__ import annotations

import dataclasses
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import spark_kernels as sk
from decode_bench.settings import Heads, Setting, Shape

# Of dense copies of layers that one shape may take.
MOST_BYTES = 2 << 30


class Case:
    """One decode step in every layer, ready to run both ways.

    Each call takes the next layer, as a step does, so a layer's cache has left the CPU's near caches when its turn
    comes again. Random content serves all layers: the copies differ in where they are.
    """

    def __init__(self, shape: Shape, heads: Heads, setting: Setting, layers: int) -> None:
        tokens = shape.tokens
        self.sm_scale = heads.sm_scale
        self.q = torch.randn(shape.batch, heads.num_qo_heads, heads.head_dim, dtype=torch.bfloat16)
        self.slots = torch.randperm(tokens + 1)[:tokens]
        k_cache, v_cache = torch.randn(2, tokens + 1, heads.num_kv_heads, heads.head_dim, dtype=torch.bfloat16)
        rows = setting.rows(tokens + 1, heads, "cpu")
        queries = torch.randn(tokens, heads.num_qo_heads, heads.head_dim, dtype=torch.bfloat16)
        sk.write_rows(queries, k_cache[self.slots], v_cache[self.slots], self.slots, rows)
        layers = min(layers, max(1, MOST_BYTES // (k_cache.nbytes + v_cache.nbytes)))
        self.dense_layers = itertools.cycle([(k_cache.clone(), v_cache.clone()) for _ in range(layers)])
        self.spark_layers = itertools.cycle(
            [dataclasses.replace(rows, keys=rows.keys.clone(), values=rows.values.clone()) for _ in range(layers)]
        )
        self.wrapper = sk.SparkBatchDecodeWrapper("cpu")
        kv_indptr = torch.arange(0, tokens + 1, shape.seq_len, dtype=torch.int32)
        self.wrapper.plan(kv_indptr, self.slots, heads.num_qo_heads, heads.num_kv_heads, heads.head_dim)
        self.req_to_token = self.slots.view(shape.batch, shape.seq_len).to(torch.int32)
        self.seq_lens = torch.full((shape.batch,), shape.seq_len)
        self.enable_gqa = heads.group > 1
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


def measure(shapes: list[Shape], heads: Heads, setting: Setting, layers: int, seconds: float) -> list[dict]:
    """A row per shape, milliseconds per layer."""
    rows = []
    for shape in shapes:
        case = Case(shape, heads, setting, layers)
        spark_ms, dense_ms = alternate(case.spark, case.dense, seconds)
        rows.append(
            {
                "seq_len": shape.seq_len,
                "batch": shape.batch,
                "spark_ms": spark_ms,
                "dense_ms": dense_ms,
                "ratio": dense_ms / spark_ms,
            }
        )
    return rows


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
