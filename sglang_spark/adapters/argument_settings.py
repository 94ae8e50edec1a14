"""SGLang 0.5.16: every process reads the argument record itself."""

from __future__ import annotations

from typing import Any

from sglang_spark.adapters.targets import Target

TARGETS = (Target("sglang.srt.runtime_context.get_server_args", ()),)


def memory_settings() -> Any:
    """What this process was started with; has the ``kv_compress`` and ``spark_*`` fields."""
    from sglang.srt.runtime_context import get_server_args

    return get_server_args()


def kv_cache_dtype(configurator: Any) -> str:
    """``--kv-cache-dtype`` of the pool that ``configurator`` builds."""
    return configurator.server_args.kv_cache_dtype
