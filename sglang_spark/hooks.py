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
    # Beside rows, window layers have a dense pool of that dtype, and what is said of it is true.
    if not builds_rows(builder) or builder.is_hybrid_swa:
        return original(builder, *args, **kwargs)
    dense_dtype, builder.kv_cache_dtype = builder.kv_cache_dtype, torch.uint8
    try:
        return original(builder, *args, **kwargs)
    finally:
        builder.kv_cache_dtype = dense_dtype


def size_by_rows(original, configurator, builder, num_layers):
    """Bytes per token that capacity is computed from."""
    return layout_of(builder).bytes_per_token if builds_rows(builder) else original(configurator, builder, num_layers)


def size_beside_windows(_, configurator, builder):
    """After a hybrid model's pools have been sized as dense: the layers that attend to everything have rows."""
    if builds_rows(builder):
        layout = layout_of(builder)
        # SGLang counts per layer, and formats may differ between layers.
        configurator._full_per_token = layout.bytes_per_token / len(layout.layers)
        configurator._recompute_cell_size()


def build_rows(original, builder, *, mha_pool_class, **settings):
    """SparK's pool in the place of the dense one; of a hybrid model, of the part that attends to everything."""
    if not builds_rows(builder):
        return original(builder, mha_pool_class=mha_pool_class, **settings)
    from sglang_spark import plugin

    plugin.check_installed()
    if "quant_method" in settings:
        settings["quant_method"] = None
    pools = functools.partial(_pool, layout_of(builder), mha_pool_class, settings.get("swa_max_total_num_tokens", 0))
    return original(builder, mha_pool_class=pools, **settings)


def layout_of(builder: Any) -> PoolLayout:
    """Rows of the layers and heads that the process of ``builder`` holds."""
    return PoolLayout.of(share_of(builder), builder.kv_cache_dtype_str, get_parallel().attn_tp_size)


def share_of(builder: Any) -> ModelShare:
    """What the process of ``builder`` holds of the model."""
    info = builder.layer_info
    layers = range(info.start_layer, info.start_layer + info.num_effective_layers)
    return ModelShare(builder.model_config, layers, builder.model_dtype)


def _pool(layout: PoolLayout, dense_pool_class: type, window_tokens: int, size: int, **kwargs):
    from sglang_spark.pool import SparkTokenToKVPool

    # What ``SWAKVPool`` (mem_cache/swa_memory_pool.py) calls the pool of its window layers.
    if kwargs.get("allocation_label") == "SWA":
        return dense_pool_class(size, **kwargs)
    pool = SparkTokenToKVPool(size, layout=layout, **kwargs)
    metrics.watch(metrics.CacheUsage(layout))
    logger.info(layout.summary(size, window_tokens))
    return pool


def calibrate_pool(original, worker, *args, **kwargs):
    """Between the pool and the backend that reads its rows: what the rows are made with."""
    runner = worker.model_runner
    if is_spark(published()) and not runner.is_draft_worker:
        from sglang_spark import calibration_forward
        from sglang_spark.pool import rows_of

        calibration = calibration_forward.of_process(runner, worker.tokenizer)
        rows_of(runner.token_to_kv_pool).calibration = calibration
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
            "sglang.srt.model_executor.pool_configurator.HybridSWAPoolConfigurator.__init__",
            ("self", "kvc"),
        ),
        size_beside_windows,
        HookType.AFTER,
        "the same beside a pool of window layers",
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
        Target(
            f"{_CONFIGURATOR}._build_hybrid_swa_kv_pool",
            ("self", "full_max_total_num_tokens", "swa_max_total_num_tokens", "mha_pool_class"),
        ),
        build_rows,
        HookType.AROUND,
        "the same beside a pool of window layers",
    ),
    Hook(
        Target(
            f"{_CONFIGURATOR}._build_hybrid_linear_kv_pool",
            ("self", "max_total_num_tokens", "req_to_token_pool", "mha_pool_class", ...),
        ),
        build_rows,
        HookType.AROUND,
        "the same beside a pool of states",
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
