"""SGLang 0.5.14 and 0.5.16: every process reads the argument record itself."""

from __future__ import annotations

from typing import Any

from sglang_spark.adapters.targets import Target

TARGETS = (
    Target("sglang.srt.server_args.get_global_server_args", ()),
    Target("sglang.srt.server_args.set_global_server_args_for_scheduler", ("server_args",)),
)


def publish(server_args: Any) -> None:
    """Make this process one that was started with these arguments, as a scheduler is."""
    from sglang.srt.server_args import set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(server_args)


def memory_settings() -> Any:
    """What this process was started with; has the ``kv_compress`` and ``spark_*`` fields."""
    from sglang.srt.server_args import get_global_server_args

    return get_global_server_args()


def kv_cache_dtype(builder: Any) -> str:
    """``--kv-cache-dtype`` of the pool that ``builder`` builds."""
    return builder.server_args.kv_cache_dtype
