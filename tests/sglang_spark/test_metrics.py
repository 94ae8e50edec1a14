"""What the cache counts, and that it reaches Prometheus under SGLang's names and labels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_spark import metrics
from sglang_spark.layout import PoolLayout
from spark_kernels import Numbers, Pruned

LAYOUT = PoolLayout(
    layers=(0, 1),
    key_formats=(Numbers(128, torch.bfloat16), Pruned.from_ratio(128, 0.8, 3)),
    value_format=Numbers(128, torch.bfloat16),
    num_kv_heads=2,
    model_dtype=torch.bfloat16,
)
LABELS = {"model_name": "llama", "tp_rank": 0}


class Recorded:
    """Stands for a Prometheus metric; `values` is shared by all metrics of a test."""

    values: ClassVar[dict[str, float]] = {}

    def __init__(self, name, documentation, labelnames, multiprocess_mode=None):
        assert documentation.endswith(".") and set(labelnames) == set(LABELS)
        self.name = name

    def labels(self, **labels):
        assert labels == LABELS
        return self

    def set(self, value):
        self.values[self.name] = value

    def inc(self, value):
        self.values[self.name] = self.values.get(self.name, 0) + value


@pytest.fixture
def usage(monkeypatch):
    usage = metrics.CacheUsage(LAYOUT)
    monkeypatch.setattr(metrics, "_usage", usage)
    return usage


@pytest.fixture
def collector(monkeypatch):
    monkeypatch.setattr(Recorded, "values", {})
    return metrics.SparkCollector(SimpleNamespace(labels=LABELS, _gauge_cls=Recorded, _counter_cls=Recorded))


def _batch(mode: ForwardMode, new: list[int] | None = None, prefixes: list[int] | None = None, size: int = 0):
    return SimpleNamespace(forward_mode=mode, batch_size=size, extend_seq_lens_cpu=new, extend_prefix_lens_cpu=prefixes)


def test_counts_of_batches(usage):
    usage.count(_batch(ForwardMode.EXTEND, new=[100, 28], prefixes=[0, 64]))
    usage.count(_batch(ForwardMode.DECODE, size=2))
    usage.count(_batch(ForwardMode.MIXED, new=[10, 1], prefixes=[100, 93]))
    usage.count(_batch(ForwardMode.IDLE))
    assert (usage.rows_written, usage.restored_prefix_tokens) == (128 + 2 + 11, 64 + 193)


def test_values_follow_the_cache(usage, collector):
    usage.count(_batch(ForwardMode.EXTEND, new=[100], prefixes=[7]))
    collector.log(SimpleNamespace(kv_used_tokens=30, kv_evictable_tokens=70))
    usage.count(_batch(ForwardMode.DECODE, size=3))
    collector.log(SimpleNamespace(kv_used_tokens=3, kv_evictable_tokens=100))
    saved = 2 * (256 - 104)
    assert Recorded.values == {
        "sglang:spark_bytes_per_token": 2 * (2 * 512 - (256 - 104)),
        "sglang:spark_dense_bytes_per_token": 2 * 2 * 512,
        "sglang:spark_kept_key_channels": 26,
        "sglang:spark_pruned_layers": 1,
        "sglang:spark_window_bytes_per_token": 0,
        "sglang:spark_saved_bytes": 103 * saved,
        "sglang:spark_rows_written_total": 103,
        "sglang:spark_restored_prefix_tokens_total": 7,
    }


def test_nothing_is_reported_without_a_compressed_cache(monkeypatch, collector):
    monkeypatch.setattr(metrics, "_usage", None)
    collector.log(SimpleNamespace(kv_used_tokens=30, kv_evictable_tokens=70))
    state = SimpleNamespace(internal_state={})
    metrics.add_server_info(state, None, None)
    metrics.count(_batch(ForwardMode.DECODE, size=1))
    assert Recorded.values == {} and state.internal_state == {}


def test_padding_of_a_captured_batch_is_not_counted(usage):
    batch = _batch(ForwardMode.DECODE, size=8)
    batch.num_padding = 3
    metrics.count(batch)
    assert usage.rows_written == 5
