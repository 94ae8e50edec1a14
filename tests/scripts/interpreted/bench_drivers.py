"""What scripts/bench_decode.py does on a GPU, with Triton's interpreter for the GPU and no clock.

Run by test_bench_decode.py. Every step is taken: rows filled, wrappers planned, SGLang's kernel set up and run; only
CUDA graphs and events are replaced.
"""

import time
from types import SimpleNamespace

import pytest
import torch

from decode_bench import cuda, methods, prefill
from decode_bench.settings import Heads, Setting, Shape

CPU, HEADS = torch.device("cpu"), Heads(2, 1, 64)
SETTINGS = [Setting(value_dtype="float16"), Setting(value_dtype="int4")]
MISSING = {"flashinfer_bf16": "no flashinfer", "flashinfer_fp8": "no flashinfer"}


class Graph:
    def __init__(self, step):
        step()
        self.replay = step


class HalfBatch(methods.Batch):
    """The interpreter multiplies bfloat16 matrices wrongly."""

    def __init__(self, lengths, heads, device, dtype):
        super().__init__(lengths, heads, device, torch.float16)


@pytest.fixture(autouse=True)
def no_gpu_and_no_clock(monkeypatch):
    for module in (cuda, prefill):
        monkeypatch.setattr(module, "median_ms", lambda step, seconds: (step(), 2.0)[1])
        monkeypatch.setattr(module, "Batch", HalfBatch)
    monkeypatch.setattr(cuda, "capture", Graph)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=100))
    monkeypatch.setitem(methods.DENSE_METHODS, "triton", (methods.SGLangTriton, torch.float16))


def _measure(monkeypatch, free_bytes: int, deadline: float) -> tuple[list[dict], list[str]]:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, free_bytes))
    log = []
    rows = cuda.measure([Shape(2, 20)], HEADS, SETTINGS, CPU, MISSING, 0.1, deadline, log.append)
    return rows, log


def test_decode(monkeypatch):
    rows, _ = _measure(monkeypatch, 1 << 30, time.monotonic() + 100)
    assert [row["setting"] for row in rows] == [str(setting) for setting in SETTINGS]
    for row in rows:
        assert row["triton_ms"] == row["dense_ms"] == row["spark_ms"] == row["copy_ms"] == 1.0
        assert row["flashinfer_bf16_ms"] is None and row["missing"] == MISSING


def test_what_does_not_fit_or_comes_too_late_is_left_out(monkeypatch):
    # Of which four fifths are taken: for two copies of a layer.
    room_for_int4 = 2 * 41 * SETTINGS[1].bytes_per_token(HEADS) * 5 // 4 + 100
    rows, log = _measure(monkeypatch, room_for_int4, time.monotonic() + 100)
    assert [row["setting"] for row in rows] == [str(SETTINGS[1])]
    assert rows[0]["missing"]["triton"] == cuda.DOES_NOT_FIT and rows[0]["ratio"] is None
    assert f"2 x 20, {SETTINGS[0]}: left out, it does not fit the memory" in log
    assert _measure(monkeypatch, 1 << 30, time.monotonic() - 1) == ([], ["2 x 20: left out, the time is up"])


def test_prefill(monkeypatch):
    monkeypatch.setattr(prefill, "CHUNK", 8)
    monkeypatch.setattr(prefill, "PREFIXES", (0, 20))
    monkeypatch.setattr(prefill, "_linear_ms", lambda *_: 9.0)
    rows = prefill.measure(HEADS, SETTINGS, CPU, MISSING, 0.1)
    assert [(row["prefix"], row["setting"]) for row in rows] == [(n, str(s)) for n in (0, 20) for s in SETTINGS]
    assert all(row["dense_ms"] is None and row["overhead"] is None for row in rows)
    monkeypatch.setattr(prefill, "_dense_ms", lambda *_: 3.0)
    row = prefill.measure(HEADS, SETTINGS[:1], CPU, {}, 0.1)[0]
    assert row["overhead"] == pytest.approx((2 + 2 - 2 - 3) / (9 + 2 + 3)) and row["missing"] == {}
