"""What SGLang calls at start-up, and the one table of everything it changes in SGLang."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any, NamedTuple

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_spark import adapters, metrics, resolution, targets
from sglang_spark.compatibility import BACKEND
from sglang_spark.layout import PoolLayout
from sglang_spark.server_args import SparkServerArgs

logger = logging.getLogger(__name__)


def spark_is_on(configurator: Any) -> bool:
    """Whether the pool that ``configurator`` (SGLang's ``KVCacheConfigurator``) builds is SparK's to build."""
    return adapters.settings.memory_settings().kv_compress == "spark" and not configurator.is_draft_worker


def configure_pool_of_bytes(original, configurator, *args, **kwargs):
    """The pool is sized and built as one of uint8: rows, not numbers of ``--kv-cache-dtype``.

    SGLang's own checks and quantizers of that dtype (such as fp8 on CPUs, which needs AMX) concern dense pools.
    """
    if spark_is_on(configurator):
        configurator.kv_cache_dtype = torch.uint8
    return original(configurator, *args, **kwargs)


def size_by_rows(original, pool_configurator, kvc, num_layers):
    """Bytes per token that capacity is computed from; ``kvc`` is SGLang's ``KVCacheConfigurator``."""
    if not spark_is_on(kvc):
        return original(pool_configurator, kvc, num_layers)
    return PoolLayout.of(kvc).bytes_per_token


def build_spark_pool(original, configurator, *, max_total_num_tokens, mha_pool_class, quant_method=None):
    """SparK's pool in the place of the dense one."""
    if not spark_is_on(configurator):
        return original(
            configurator,
            max_total_num_tokens=max_total_num_tokens,
            mha_pool_class=mha_pool_class,
            quant_method=quant_method,
        )
    from sglang_spark.pool import SparkTokenToKVPool

    check_installed()
    layout = PoolLayout.of(configurator)
    pool = original(
        configurator,
        max_total_num_tokens=max_total_num_tokens,
        mha_pool_class=functools.partial(SparkTokenToKVPool, layout=layout),
        quant_method=None,
    )
    metrics.watch(metrics.CacheUsage(layout))
    logger.info(layout.summary(max_total_num_tokens))
    return pool


def build_spark_backend(model_runner):
    """Factory that SGLang calls for ``attention_backend="spark"``."""
    from sglang_spark import canary
    from sglang_spark.attention.backend import SparkAttnBackend

    check_installed()
    return canary.CanaryBackend(model_runner) if canary.is_on() else SparkAttnBackend(model_runner)


class Hook(NamedTuple):
    """One change to SGLang: where, with what, and why."""

    target: str
    replacement: Any
    type: HookType
    reason: str


HOOKS: tuple[Hook, ...] = (
    Hook(
        "sglang.srt.server_args.ServerArgs",
        SparkServerArgs,
        HookType.REPLACE,
        "the four flags, in every place where SGLang reads arguments",
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.configure",
        configure_pool_of_bytes,
        HookType.AROUND,
        "the pool holds bytes",
    ),
    Hook(
        "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        size_by_rows,
        HookType.AROUND,
        "capacity from the real bytes per token",
    ),
    Hook(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_mha_kv_pool",
        build_spark_pool,
        HookType.AROUND,
        "the pool itself",
    ),
    Hook(
        "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.__init__",
        metrics.add_metrics,
        HookType.AFTER,
        "metrics of the compressed cache",
    ),
    Hook(
        "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector.log_stats",
        metrics.log_metrics,
        HookType.AFTER,
        "their values, whenever SGLang publishes its own",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        metrics.count_batch,
        HookType.AFTER,
        "rows written and prefixes restored",
    ),
    Hook(
        "sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        metrics.add_server_info,
        HookType.AFTER,
        "sizes and counts in /server_info",
    ),
)

# Steps of SGLang's argument resolution that SparK wraps.
RESOLUTION_HOOKS = {
    "handle_missing_default_values": resolution.check_request,
    "handle_attention_backend_compatibility": resolution.choose_backend,
}


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``; SGLang calls it in every process.

    Without ``--kv-compress spark`` every hook passes through to what it wraps. SGLang only logs an exception raised
    here and goes on: the flag then does not exist, and the pool and the backend call `check_installed` besides.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    adapters.arguments.add_backend_choice(BACKEND)
    register_attention_backend(BACKEND)(build_spark_backend)
    for hook in HOOKS:
        HookRegistry.register(hook.target, hook.replacement, hook.type)
    adapters.arguments.wrap_steps(SparkServerArgs, RESOLUTION_HOOKS)
    # Engine binds the argument class when its module is imported, which may have happened before plugins load.
    engine = sys.modules.get("sglang.srt.entrypoints.engine")
    if engine is not None:
        engine.Engine.server_args_class = SparkServerArgs


def check_installed() -> None:
    """Stop a process in which SGLang did not apply every hook.

    Raises
    ------
    RuntimeError
        Names the targets. SGLang's registry logs a hook that it could not apply and continues, which would serve
        something other than what was asked for.
    """
    missing = [hook.target for hook in HOOKS if not targets.is_applied(hook)]
    if missing:
        raise RuntimeError(
            "--kv-compress spark was asked for, but these SGLang functions are not hooked in this process: "
            + ", ".join(missing)
            + ". Is this SGLang version supported, and is SGLANG_PLUGINS unset or does it contain 'spark'?"
        )
