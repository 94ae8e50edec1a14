"""SGLang 0.5.18 on: every process publishes its arguments in namespaces."""

from __future__ import annotations

from typing import Any

from sglang_spark.adapters.targets import Target

TARGETS = (
    Target("sglang.srt.runtime_context.get_memory", ()),
    Target("sglang.srt.runtime_context.publish", ("server_args", "role", ...)),
)


def publish(server_args: Any) -> None:
    """Make this process one that was started with these arguments, as a scheduler is."""
    from sglang.srt.runtime_context import publish

    publish(server_args, role="scheduler")


def memory_settings() -> Any:
    """What this process was started with; has the ``kv_compress`` and ``spark_*`` fields."""
    from sglang.srt.runtime_context import get_memory

    return get_memory()


def kv_cache_dtype(builder: Any) -> str:
    """``--kv-cache-dtype`` of the pool that ``builder`` builds."""
    return builder.kv_cache_dtype_str
