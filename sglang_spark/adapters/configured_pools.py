"""SGLang 0.5.16 on: a configurator sizes and builds the pools, and a pool describes its buffers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sglang_spark.adapters.model_share import ModelShare
from sglang_spark.adapters.targets import Target

_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
_POOL = "sglang.srt.mem_cache.memory_pool"

# What reads the dtype of the pool, from sizing it to building it; bytes per token; the pool.
CONFIGURE = Target(f"{_CONFIGURATOR}.configure", ("self", "pre_model_load_memory"))
CELL_SIZE = Target(
    "sglang.srt.model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
    ("self", "kvc", "num_layers"),
)
BUILD = Target(
    f"{_CONFIGURATOR}._build_mha_kv_pool", ("self", "max_total_num_tokens", "mha_pool_class", "quant_method")
)

TARGETS = (
    Target(f"{_POOL}.MHATokenToKVPool._create_buffers_normal", ("self",)),
    Target(f"{_POOL}.MHATokenToKVPool._build_kv_buffer_descs", ("self",)),
    Target(f"{_POOL}.KvBufferDesc", ("name", "shape", "row_bytes", "tokens_per_row")),
    Target("sglang.srt.configs.hybrid_arch.mambaish_config", ("model_config",)),
)

# Settings that SparK refuses and these releases do not have.
ABSENT_SETTINGS: frozenset[str] = frozenset()


def share_of(builder: Any) -> ModelShare:
    """What the process of ``builder``, a ``KVCacheConfigurator``, holds of the model."""
    # SGLang counts a looped model's loops twice where its end_layer has them already.
    count = min(builder.layer_info.num_effective_layers, builder.model_config.num_attention_layers)
    layers = range(builder.layer_info.start_layer, builder.layer_info.start_layer + count)
    return ModelShare(builder.model_config, layers, builder.model_dtype)


def build(original: Callable, builder: Any, settings: dict[str, Any], pool_class: Callable) -> Any:
    """What `BUILD` wraps, with a ``pool_class`` in the place of SGLang's dense pool."""
    return original(builder, **{**settings, "mha_pool_class": pool_class, "quant_method": None})


def has_hybrid_layers(model_config: Any) -> bool:
    """Whether SGLang builds a hybrid pool, for linear-attention or state-space layers."""
    from sglang.srt.configs.hybrid_arch import mambaish_config

    return mambaish_config(model_config) is not None


class RowBuffers:
    """The part of a pool of rows that makes its buffers; goes before ``MHATokenToKVPool`` among the base classes."""

    def _create_buffers_normal(self):
        self.k_buffer, self.v_buffer = self.make_buffers()

    def _build_kv_buffer_descs(self):
        from sglang.srt.mem_cache.memory_pool import KvBufferDesc

        names = [f"{kind}{layer}" for kind in "kv" for layer in range(self.layer_num)]
        return [
            KvBufferDesc(name, shape, row_bytes=math.prod(shape[1:]), tokens_per_row=1)
            for name, shape in zip(names, self.buffer_shapes(), strict=True)
        ]
