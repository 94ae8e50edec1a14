"""SGLang 0.5.10: a scheduler's stats do not count the tokens that are cached only."""

from __future__ import annotations

from typing import Any

from sglang_spark.adapters.targets import Target

_METRICS = "sglang.srt.observability.metrics_collector"

TARGETS = (Target(f"{_METRICS}.SchedulerStats.num_used_tokens"),)


def held_tokens(stats: Any) -> int:
    """Tokens in the pool that requests use."""
    return stats.num_used_tokens


def metric_classes(collector: Any) -> tuple[Any, Any]:
    """The classes of gauges and of counters that SGLang's ``collector`` makes its own metrics of."""
    from prometheus_client import Counter, Gauge

    return Gauge, Counter
