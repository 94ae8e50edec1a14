"""SGLang 0.5.14 on: what a scheduler's stats call the tokens it holds, and who makes metrics."""

from __future__ import annotations

from typing import Any

from sglang_spark.adapters.targets import Target

_METRICS = "sglang.srt.observability.metrics_collector"

TARGETS = (
    Target(f"{_METRICS}.SchedulerStats.kv_used_tokens"),
    Target(f"{_METRICS}.SchedulerStats.kv_evictable_tokens"),
    Target(f"{_METRICS}.SchedulerMetricsCollector._gauge_cls"),
    Target(f"{_METRICS}.SchedulerMetricsCollector._counter_cls"),
)


def held_tokens(stats: Any) -> int:
    """Tokens in the pool, in use and cached."""
    return stats.kv_used_tokens + stats.kv_evictable_tokens


def metric_classes(collector: Any) -> tuple[Any, Any]:
    """The classes of gauges and of counters that SGLang's ``collector`` makes its own metrics of."""
    from prometheus_client import Counter, Gauge

    return collector._gauge_cls or Gauge, collector._counter_cls or Counter
