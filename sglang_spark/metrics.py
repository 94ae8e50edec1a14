"""What the compressed cache reports while it serves: Prometheus metrics and fields of ``/server_info``.

SGLang exposes its metrics with ``--enable-metrics``. These join them under its names and labels; the counts behind
them are kept either way and cost a few additions per batch.
"""

from __future__ import annotations

from typing import Any

from sglang_spark.layout import PoolLayout
from sglang_spark.server_args import is_spark, published


class CacheUsage:
    """What this process's compressed cache holds and has done since it was built.

    Parameters
    ----------
    layout
        Row formats of the layers this process holds.
    """

    def __init__(self, layout: PoolLayout):
        self.layout = layout
        # Where the calibration comes from and which it is; servers that exchange rows compare fingerprints.
        self.calibration: dict[str, str] = {}
        self.rows_written = 0
        self.restored_prefix_tokens = 0

    def count(self, forward_batch: Any) -> None:
        """Add a batch; reads only what SGLang keeps on the host."""
        mode = forward_batch.forward_mode
        if mode.is_decode():
            # A captured batch is filled up with padding.
            self.rows_written += forward_batch.batch_size - (getattr(forward_batch, "num_padding", 0) or 0)
        elif mode.is_target_verify():
            self.rows_written += len(forward_batch.out_cache_loc)
        elif mode.is_extend():
            self.rows_written += sum(forward_batch.extend_seq_lens_cpu)
            self.restored_prefix_tokens += sum(forward_batch.extend_prefix_lens_cpu)

    def saved_bytes(self, num_tokens: int) -> int:
        """Bytes that ``num_tokens`` cached tokens would take in a dense cache and do not take here."""
        return num_tokens * (self.layout.dense_bytes_per_token - self.layout.bytes_per_token)

    def report(self) -> dict[str, Any]:
        """Everything that `/server_info` shows, per process."""
        return {
            **self.layout.sizes(),
            "calibration": self.calibration,
            "rows_written": self.rows_written,
            "restored_prefix_tokens": self.restored_prefix_tokens,
        }


# A scheduler process has one pool and one collector, and SGLang builds them without handing one to the other.
_usage: CacheUsage | None = None


def watch(usage: CacheUsage) -> None:
    """Report this cache from now on; called when the pool is built."""
    global _usage
    _usage = usage


def count(forward_batch: Any) -> None:
    """Add a batch that attention is planned for."""
    if _usage is not None:
        _usage.count(forward_batch)


def show_calibration(source: str, fingerprint: str) -> None:
    """Report a calibration beside the cache that it is for."""
    _usage.calibration = {"source": source, "fingerprint": fingerprint}


class SparkCollector:
    """SparK's metrics in SGLang's registry, with the labels of SGLang's own scheduler metrics.

    Parameters
    ----------
    collector
        SGLang's ``SchedulerMetricsCollector``.
    """

    def __init__(self, collector: Any):
        # Not at the top: SGLang sets PROMETHEUS_MULTIPROC_DIR before it imports these.
        from prometheus_client import Counter, Gauge

        gauge_class, counter_class = collector._gauge_cls or Gauge, collector._counter_cls or Counter
        self._labels = collector.labels

        def gauge(name: str, documentation: str):
            return gauge_class(
                name=f"sglang:spark_{name}",
                documentation=documentation,
                labelnames=collector.labels.keys(),
                multiprocess_mode="mostrecent",
            )

        def counter(name: str, documentation: str):
            return counter_class(
                name=f"sglang:spark_{name}", documentation=documentation, labelnames=collector.labels.keys()
            )

        self._sizes = {
            "bytes_per_token": gauge("bytes_per_token", "Bytes a token takes in this process's compressed KV cache."),
            "dense_bytes_per_token": gauge(
                "dense_bytes_per_token", "Bytes a token would take in a dense KV cache of the model's dtype."
            ),
            "kept_key_channels": gauge("kept_key_channels", "Key channels kept per token and KV head where pruned."),
            "pruned_layers": gauge("pruned_layers", "Layers of this process whose keys are pruned."),
            "window_bytes_per_token": gauge(
                "window_bytes_per_token", "Bytes a token takes in this process's dense pool of window layers, if any."
            ),
        }
        self._saved_bytes = gauge(
            "saved_bytes", "Bytes that the tokens held, in use and cached, would take in a dense KV cache besides."
        )
        self._counters = {
            "rows_written": counter("rows_written_total", "Tokens whose rows were written to the compressed KV cache."),
            "restored_prefix_tokens": counter(
                "restored_prefix_tokens_total",
                "Tokens of cached prefixes and earlier chunks that prefill attended to as restored from rows.",
            ),
        }
        self._counted = dict.fromkeys(self._counters, 0)

    def log(self, stats: Any) -> None:
        """Publish the state of the cache; ``stats`` is SGLang's ``SchedulerStats`` of the same moment."""
        if _usage is None:
            return
        report = _usage.report()
        held = stats.kv_used_tokens + stats.kv_evictable_tokens
        for name, gauge in self._sizes.items():
            gauge.labels(**self._labels).set(report[name])
        self._saved_bytes.labels(**self._labels).set(_usage.saved_bytes(held))
        for name, counter in self._counters.items():
            counter.labels(**self._labels).inc(report[name] - self._counted[name])
            self._counted[name] = report[name]


def add_metrics(_, collector, *args, **kwargs):
    """After SGLang's scheduler collector is made: SparK's metrics beside its own."""
    if is_spark(published()):
        collector.spark = SparkCollector(collector)


def log_metrics(_, collector, stats):
    """After SGLang has published its scheduler metrics."""
    if hasattr(collector, "spark"):
        collector.spark.log(stats)


def add_server_info(output, scheduler, recv_req):
    """After a scheduler has described itself for ``/server_info``."""
    if _usage is not None:
        output.internal_state["spark_kv_cache"] = _usage.report()
