"""SGLang 0.5.10 to 0.5.14: the model runner sizes and builds its pools itself."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch

from sglang_spark.adapters.model_share import ModelShare
from sglang_spark.adapters.targets import Target, exists

_MIXIN = "sglang.srt.model_executor.model_runner_kv_cache_mixin"
_RUNNER = f"{_MIXIN}.ModelRunnerKVCacheMixin"
# Not in 0.5.10.
_SIZER = "sglang.srt.model_executor.pool_configurator"

# What reads the dtype of the pool, from sizing it to building it; bytes per token; the pool.
CONFIGURE = Target(f"{_RUNNER}.init_memory_pool", ("self", "pre_model_load_memory"))
CELL_SIZE = (
    Target(f"{_SIZER}.DefaultPoolConfigurator._compute_cell_size", ("self", "mr", "num_layers"))
    if exists(_SIZER)
    else Target(f"{_RUNNER}.get_cell_size_per_token", ("self", "num_layers"))
)
BUILD = Target(f"{_RUNNER}._init_pools", ("self",))

TARGETS = (
    # The name by which `BUILD` calls it.
    Target(f"{_MIXIN}.MHATokenToKVPool"),
    Target("sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._create_buffers", ("self",)),
    Target("sglang.srt.model_executor.model_runner.ModelRunner.mambaish_config"),
)

# Settings that SparK refuses and these releases do not have.
ABSENT_SETTINGS = frozenset({"dcp_size", "enable_page_major_kv_layout", "enable_unified_memory"})


def share_of(builder: Any) -> ModelShare:
    """What the process of ``builder``, a ``ModelRunner``, holds of the model."""
    return ModelShare(builder.model_config, range(builder.start_layer, builder.end_layer), builder.dtype)


def build(original: Callable, builder: Any, settings: dict[str, Any], pool_class: Callable) -> Any:
    """What `BUILD` wraps, with a ``pool_class`` in the place of SGLang's dense pool."""
    mixin = importlib.import_module(_MIXIN)
    dense_class, mixin.MHATokenToKVPool = mixin.MHATokenToKVPool, pool_class
    try:
        return original(builder, **settings)
    finally:
        mixin.MHATokenToKVPool = dense_class


def has_hybrid_layers(model_config: Any) -> bool:
    """Whether SGLang builds a hybrid pool, for linear-attention or state-space layers."""
    from sglang.srt.model_executor import model_runner

    # A property of runners, which reads no more than this of them; 0.5.10 has no cache.
    runner = model_runner.ModelRunner.__new__(model_runner.ModelRunner)
    runner.model_config, runner.is_draft_worker = model_config, False
    runner._linear_attn_registry_cache = getattr(model_runner, "_UNSET", None)
    return runner.mambaish_config is not None


class RowBuffers:
    """The part of a pool of rows that makes its buffers; goes before ``MHATokenToKVPool`` among the base classes."""

    def _create_buffers(self):
        self.k_buffer, self.v_buffer = self.make_buffers()
        self.k_data_ptrs, self.v_data_ptrs = (self._pointers(buffers) for buffers in (self.k_buffer, self.v_buffer))
        self.data_ptrs = torch.cat([self.k_data_ptrs, self.v_data_ptrs])
        self.data_strides = torch.tensor([math.prod(shape[1:]) for shape in self.buffer_shapes()], device=self.device)

    def _pointers(self, buffers: list[torch.Tensor]) -> torch.Tensor:
        return torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.uint64, device=self.device)
