"""How many bytes a token takes in this process's pool, and what that means for capacity."""

from __future__ import annotations

import copy
from collections.abc import Container
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from sglang_spark.config import SparkConfig
from sglang_spark.hybrid import row_layers
from sglang_spark.server_args import published
from spark_kernels.formats import KeyFormat, Pruned, ValueFormat


class ModelShare(NamedTuple):
    """What a process's pool is made for.

    Parameters
    ----------
    model_config
        SGLang's ``ModelConfig`` of the model.
    layers
        Global ids of the layers that the process holds.
    model_dtype
        What a dense cache would store.
    """

    model_config: Any
    layers: Container[int]
    model_dtype: torch.dtype


class WindowPool(NamedTuple):
    """SGLang's dense pool of a process's window layers, beside the rows.

    Parameters
    ----------
    num_layers
        Of them.
    bytes_per_token
        Of a token within the window, all these layers and their KV heads.
    """

    num_layers: int
    bytes_per_token: int

    def summary(self, num_tokens: int) -> str:
        """What the start-up line says of it."""
        return (
            f"; beside them {self.num_layers} window layers, dense, {self.bytes_per_token} bytes per token for "
            f"{num_tokens} tokens"
        )


@dataclass(frozen=True, kw_only=True)
class PoolLayout:
    """Row formats of the layers this process holds.

    Parameters
    ----------
    layers
        Their global ids, ascending.
    key_formats
        One per layer.
    value_format
        The same for all layers.
    num_kv_heads
        KV heads this process holds (after tensor parallelism).
    model_dtype
        What a dense cache would store.
    windows
        What stands beside the rows in a model with window layers.
    """

    layers: tuple[int, ...]
    key_formats: tuple[KeyFormat, ...]
    value_format: ValueFormat
    num_kv_heads: int
    model_dtype: torch.dtype
    windows: WindowPool | None = None

    @classmethod
    def of(cls, share: ModelShare, kv_cache_dtype: str, attention_tp_size: int) -> PoolLayout:
        """The layout that the published arguments ask for.

        Parameters
        ----------
        share
            What this process holds of the model.
        kv_cache_dtype
            ``--kv-cache-dtype`` as resolved.
        attention_tp_size
            Processes that share the heads of an attention layer.
        """
        model_config = share.model_config
        config = SparkConfig.of(published(), model_config)
        dense_dtype = torch.float8_e4m3fn if kv_cache_dtype == "fp8_e4m3" else share.model_dtype
        layers = tuple(layer_id for layer_id in row_layers(model_config) if layer_id in share.layers)
        if not layers:
            raise ValueError(
                "--pp-size: a stage of the pipeline would hold none of the layers that attend to the whole context, "
                f"which are {', '.join(map(str, row_layers(model_config)))}. Use fewer stages"
            )
        return cls(
            layers=layers,
            key_formats=tuple(
                config.key_format(layer_id, model_config.head_dim, share.model_dtype) for layer_id in layers
            ),
            value_format=config.value_format(model_config.v_head_dim, dense_dtype),
            num_kv_heads=model_config.get_num_kv_heads(attention_tp_size),
            model_dtype=share.model_dtype,
            windows=_window_pool(share, dense_dtype, attention_tp_size) if model_config.is_hybrid_swa else None,
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes in this process, all local layers and KV heads."""
        rows = sum(key_format.row_bytes + self.value_format.row_bytes for key_format in self.key_formats)
        return rows * self.num_kv_heads

    @property
    def dense_bytes_per_token(self) -> int:
        """Bytes one token would take in a dense cache of the model's dtype."""
        channels = self.key_formats[0].head_dim + self.value_format.head_dim
        return channels * self.model_dtype.itemsize * len(self.key_formats) * self.num_kv_heads

    def sizes(self) -> dict[str, int]:
        """What metrics and ``/server_info`` show; without a pruned layer all channels are kept."""
        pruned = [key_format for key_format in self.key_formats if isinstance(key_format, Pruned)]
        return {
            "bytes_per_token": self.bytes_per_token,
            "dense_bytes_per_token": self.dense_bytes_per_token,
            "kept_key_channels": pruned[0].kept_channels if pruned else self.key_formats[0].head_dim,
            "pruned_layers": len(pruned),
            "window_bytes_per_token": self.windows.bytes_per_token if self.windows else 0,
        }

    def summary(self, num_tokens: int, window_tokens: int = 0) -> str:
        """One line for the log: bytes per token, keys, values and capacity, with as many tokens in a window pool."""
        beside = window_tokens * self.windows.bytes_per_token if self.windows else 0
        times = (num_tokens * self.dense_bytes_per_token + beside) / (num_tokens * self.bytes_per_token + beside)
        dense_tokens = int(num_tokens / times)
        pruned = [key_format for key_format in self.key_formats if isinstance(key_format, Pruned)]
        if pruned:
            keys = (
                f"{pruned[0].kept_channels} of {pruned[0].head_dim} key channels kept and the others restored from "
                f"{pruned[0].restore_bits:g} bits in {len(pruned)}"
            )
        else:
            keys = "all key channels kept in all"
        return (
            f"SparK KV cache: {self.bytes_per_token} bytes per token against {self.dense_bytes_per_token} dense "
            f"({self.bytes_per_token / self.dense_bytes_per_token:.3f}), {keys} of {len(self.key_formats)} layers, "
            f"{self.value_format.name} values, "
            f"{num_tokens} tokens against {dense_tokens} dense "
            f"({times:.2f}x)" + (self.windows.summary(window_tokens) if self.windows else "")
        )


def _window_pool(share: ModelShare, dtype: torch.dtype, attention_tp_size: int) -> WindowPool:
    """As ``HybridSWAPoolConfigurator`` (model_executor/pool_configurator.py) counts it."""
    model_config = share.model_config
    num_layers = sum(layer_id in share.layers for layer_id in model_config.swa_attention_layer_ids)
    channels = model_config.swa_head_dim + model_config.swa_v_head_dim
    num_kv_heads = model_config.get_swa_num_kv_heads(attention_tp_size)
    return WindowPool(num_layers, num_layers * num_kv_heads * channels * dtype.itemsize)


def planned_layouts(arguments: Any, model_config: Any) -> list[PoolLayout]:
    """The layouts that a server would find, by pipeline stage, without starting it.

    Makes of the model what SGLang's ``ModelRunner`` makes of it before it sizes the pool: heads padded to a multiple of
    the tensor parallel size (on CPUs), and the cache's dtype from the checkpoint where the flag is ``auto``.

    Parameters
    ----------
    arguments
        Resolved server arguments, published in this process.
    model_config
        SGLang's ``ModelConfig``; left as it is.
    """
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
    from sglang.srt.distributed.utils import get_pp_indices
    from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype
    from sglang.srt.model_loader.loader import _get_quantization_config

    model_config = copy.deepcopy(model_config)
    model = SimpleNamespace(quant_config=_get_quantization_config(model_config, LoadConfig()))
    if arguments.device == "cpu":
        adjust_config_with_unaligned_cpu_tp(model_config, LoadConfig(), arguments.tp_size)
    kv_cache_dtype, _ = configure_kv_cache_dtype(
        server_args_kv_cache_dtype=arguments.kv_cache_dtype,
        model=model,
        model_dtype=model_config.dtype,
        is_draft_worker=False,
        is_dflash=False,
        speculative_draft_attention_backend=None,
    )
    attention_tp_size = arguments.tp_size // (arguments.dp_size if arguments.enable_dp_attention else 1)
    stages = (
        range(*get_pp_indices(model_config.num_attention_layers, stage, arguments.pp_size))
        for stage in range(arguments.pp_size)
    )
    return [
        PoolLayout.of(
            ModelShare(model_config, layers, model_config.dtype),
            kv_cache_dtype or arguments.kv_cache_dtype,
            attention_tp_size,
        )
        for layers in stages
    ]
