"""What SGLang calls at start-up, and the one table of everything it changes in SGLang."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any, NamedTuple

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_spark import adapters, metrics, resolution
from sglang_spark.adapters.targets import Target, check_release, warn_of_release
from sglang_spark.conditions import BACKEND
from sglang_spark.layout import PoolLayout
from sglang_spark.server_args import SparkServerArgs

logger = logging.getLogger(__name__)


def spark_is_on(builder: Any) -> bool:
    """Whether the pool that ``builder`` (see `adapters.pools`) builds is SparK's to build."""
    return adapters.settings.memory_settings().kv_compress == "spark" and not builder.is_draft_worker


def configure_pool_of_bytes(original, builder, *args, **kwargs):
    """The pool is sized and built as one of uint8: rows, not numbers of ``--kv-cache-dtype``.

    SGLang's own checks and quantizers of that dtype (such as fp8 on CPUs, which needs AMX) concern dense pools.
    """
    if not spark_is_on(builder):
        return original(builder, *args, **kwargs)
    dense_dtype, builder.kv_cache_dtype = builder.kv_cache_dtype, torch.uint8
    try:
        return original(builder, *args, **kwargs)
    finally:
        builder.kv_cache_dtype = dense_dtype


def size_by_rows(original, *args):
    """Bytes per token that capacity is computed from; the builder of the pool is the last argument but one."""
    builder = args[-2]
    return _layout_of(builder).bytes_per_token if spark_is_on(builder) else original(*args)


def build_spark_pool(original, builder, **settings):
    """SparK's pool in the place of the dense one."""
    if not spark_is_on(builder):
        return original(builder, **settings)
    check_installed()
    return adapters.pools.build(original, builder, settings, functools.partial(_spark_pool, _layout_of(builder)))


def _layout_of(builder: Any) -> PoolLayout:
    return PoolLayout.of(
        adapters.pools.share_of(builder),
        adapters.settings.kv_cache_dtype(builder),
        adapters.backend.attention_tp_size(),
    )


def _spark_pool(layout: PoolLayout, size: int, **kwargs):
    from sglang_spark.pool import SparkTokenToKVPool

    pool = SparkTokenToKVPool(size, layout=layout, **kwargs)
    metrics.watch(metrics.CacheUsage(layout))
    logger.info(layout.summary(size))
    return pool


def calibrate_pool(original, worker, *args, **kwargs):
    """Between the pool and the backend that reads its rows: what the rows are made with."""
    runner = worker.model_runner
    if adapters.settings.memory_settings().kv_compress == "spark" and not runner.is_draft_worker:
        from sglang_spark import calibration_forward

        calibration = calibration_forward.of_process(runner, worker.tokenizer)
        runner.token_to_kv_pool.calibration = calibration
        metrics.show_calibration(calibration.source, calibration.fingerprint)
    return original(worker, *args, **kwargs)


def build_spark_backend(model_runner):
    """Factory that SGLang calls for ``attention_backend="spark"``."""
    from sglang_spark import canary
    from sglang_spark.attention.backend import SparkAttnBackend

    check_installed()
    return canary.CanaryBackend(model_runner) if canary.is_on() else SparkAttnBackend(model_runner)


class Hook(NamedTuple):
    """One change to SGLang: where, with what, and why."""

    target: Target
    replacement: Any
    type: HookType
    reason: str

    def is_applied(self) -> bool:
        """Whether SGLang's registry has put the hook in place in this process."""
        current = self.target.current()
        return current is self.replacement if self.type is HookType.REPLACE else hasattr(current, "__wrapped__")


_COLLECTOR = "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector"

HOOKS: tuple[Hook, ...] = (
    Hook(
        Target("sglang.srt.server_args.ServerArgs"),
        SparkServerArgs,
        HookType.REPLACE,
        "the five flags, in every place where SGLang reads arguments",
    ),
    Hook(adapters.pools.CONFIGURE, configure_pool_of_bytes, HookType.AROUND, "the pool holds bytes"),
    Hook(adapters.pools.CELL_SIZE, size_by_rows, HookType.AROUND, "capacity from the real bytes per token"),
    Hook(adapters.pools.BUILD, build_spark_pool, HookType.AROUND, "the pool itself"),
    Hook(
        Target("sglang.srt.managers.tp_worker.TpModelWorker.init_attention_backends", ("self",)),
        calibrate_pool,
        HookType.AROUND,
        "the calibration, when the weights are loaded, the pool is made and no graph is captured",
    ),
    Hook(
        Target(f"{_COLLECTOR}.__init__", ("self", ...)),
        metrics.add_metrics,
        HookType.AFTER,
        "metrics of the compressed cache",
    ),
    Hook(
        Target(f"{_COLLECTOR}.log_stats", ("self", "stats")),
        metrics.log_metrics,
        HookType.AFTER,
        "their values, whenever SGLang publishes its own",
    ),
    Hook(
        Target("sglang.srt.model_executor.model_runner.ModelRunner.forward", ("self", "forward_batch", ...)),
        metrics.count_batch,
        HookType.AFTER,
        "rows written and prefixes restored",
    ),
    Hook(
        Target("sglang.srt.managers.scheduler.Scheduler.get_internal_state", ("self", "recv_req")),
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

# All that SparK needs of the installed release.
TARGETS = (*adapters.TARGETS, *(hook.target for hook in HOOKS))


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``; SGLang calls it in every process.

    Without ``--kv-compress spark`` every hook passes through to what it wraps. SGLang only logs an exception raised
    here and goes on: the flag then does not exist, and the pool and the backend call `check_installed` besides.

    Raises
    ------
    UnsupportedSGLangError
        This release was not run before and lacks a target.
    """
    check_release(adapters.RELEASE, TARGETS)
    warn_of_release(adapters.RELEASE)
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    adapters.arguments.add_backend_choice(BACKEND)
    register_attention_backend(BACKEND)(build_spark_backend)
    for hook in HOOKS:
        HookRegistry.register(hook.target.path, hook.replacement, hook.type)
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
    missing = [hook.target.path for hook in HOOKS if not hook.is_applied()]
    if missing:
        raise RuntimeError(
            "--kv-compress spark was asked for, but these SGLang functions are not hooked in this process: "
            + ", ".join(missing)
            + ". Is this SGLang version supported, and is SGLANG_PLUGINS unset or does it contain 'spark'?"
        )
