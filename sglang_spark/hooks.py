"""The one table of everything SparK wraps in SGLang, and what goes around the building of a pool."""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel

from sglang_spark import metrics, resolution, server_args
from sglang_spark.layout import ModelShare, PoolLayout
from sglang_spark.server_args import is_spark, published
from sglang_spark.targets import Target

logger = logging.getLogger(__name__)


def builds_rows(builder: Any) -> bool:
    """Whether the pool of ``builder``, a ``KVCacheConfigurator``, is SparK's to build."""
    return is_spark(published()) and not builder.is_draft_worker


def configure_pool_of_bytes(original, builder, *args, **kwargs):
    """The pool is sized and built as one of uint8: rows, not numbers of ``--kv-cache-dtype``.

    SGLang's own checks and quantizers of that dtype (such as fp8 on CPUs, which needs AMX) concern dense pools.
    """
    if not builds_rows(builder):
        return original(builder, *args, **kwargs)
    dense_dtype, builder.kv_cache_dtype = builder.kv_cache_dtype, torch.uint8
    try:
        return original(builder, *args, **kwargs)
    finally:
        builder.kv_cache_dtype = dense_dtype


def size_by_rows(original, configurator, builder, num_layers):
    """Bytes per token that capacity is computed from."""
    return layout_of(builder).bytes_per_token if builds_rows(builder) else original(configurator, builder, num_layers)


def build_rows(original, builder, **settings):
    """SparK's pool in the place of the dense one."""
    if not builds_rows(builder):
        return original(builder, **settings)
    from sglang_spark import plugin

    plugin.check_installed()
    settings |= {"mha_pool_class": functools.partial(_pool, layout_of(builder)), "quant_method": None}
    return original(builder, **settings)


def layout_of(builder: Any) -> PoolLayout:
    """Rows of the layers and heads that the process of ``builder`` holds."""
    return PoolLayout.of(share_of(builder), builder.kv_cache_dtype_str, get_parallel().attn_tp_size)


def share_of(builder: Any) -> ModelShare:
    """What the process of ``builder`` holds of the model."""
    # SGLang counts a looped model's loops twice where its end_layer has them already.
    count = min(builder.layer_info.num_effective_layers, builder.model_config.num_attention_layers)
    layers = range(builder.layer_info.start_layer, builder.layer_info.start_layer + count)
    return ModelShare(builder.model_config, layers, builder.model_dtype)


def _pool(layout: PoolLayout, size: int, **kwargs):
    from sglang_spark.pool import SparkTokenToKVPool

    pool = SparkTokenToKVPool(size, layout=layout, **kwargs)
    metrics.watch(metrics.CacheUsage(layout))
    logger.info(layout.summary(size))
    return pool


def calibrate_pool(original, worker, *args, **kwargs):
    """Between the pool and the backend that reads its rows: what the rows are made with."""
    runner = worker.model_runner
    if is_spark(published()) and not runner.is_draft_worker:
        from sglang_spark import calibration_forward

        calibration = calibration_forward.of_process(runner, worker.tokenizer)
        runner.token_to_kv_pool.calibration = calibration
        metrics.show_calibration(calibration.source, calibration.fingerprint)
    return original(worker, *args, **kwargs)


class Hook(NamedTuple):
    """One change to SGLang: where, with what, and why."""

    target: Target
    replacement: Any
    type: HookType
    reason: str

    def is_applied(self) -> bool:
        """Whether SGLang's registry has put this very hook in place in this process, below others or not."""
        wrapper = self.target.current()
        while wrapper is not None:
            cells = getattr(wrapper, "__closure__", None) or ()
            if any(cell.cell_contents is self.replacement for cell in cells):
                return True
            wrapper = getattr(wrapper, "__wrapped__", None)
        return False


_ARGUMENTS = "sglang.srt.server_args.ServerArgs"
_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_COLLECTOR = "sglang.srt.observability.metrics_collector.SchedulerMetricsCollector"

HOOKS: tuple[Hook, ...] = (
    Hook(
        Target(f"{_ARGUMENTS}.add_cli_args", ("parser",)),
        server_args.add_flags,
        HookType.AFTER,
        "the flags",
    ),
    Hook(
        Target(f"{_ARGUMENTS}.from_cli_args", ("args",)),
        server_args.record_of_flags,
        HookType.AROUND,
        "a record that has them, where one is used",
    ),
    Hook(
        Target(f"{_CONFIGURATOR}.configure", ("self", "pre_model_load_memory")),
        configure_pool_of_bytes,
        HookType.AROUND,
        "the pool holds bytes",
    ),
    Hook(
        Target(
            "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
            ("self", "kvc", "num_layers"),
        ),
        size_by_rows,
        HookType.AROUND,
        "capacity from the real bytes per token",
    ),
    Hook(
        Target(
            f"{_CONFIGURATOR}._build_mha_kv_pool", ("self", "max_total_num_tokens", "mha_pool_class", "quant_method")
        ),
        build_rows,
        HookType.AROUND,
        "the pool itself",
    ),
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
