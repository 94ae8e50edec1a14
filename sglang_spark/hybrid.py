"""Hybrid models: which of their layers have rows, and who serves the others."""

from __future__ import annotations

import json
import logging
from typing import Any

from sglang.srt.arg_groups.model_override_base import get_default_attn_backend
from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.utils import cpu_has_amx_support

logger = logging.getLogger(__name__)

SOURCE = "sglang_spark"
# Backends of SGLang that read the pools they are shown and take pages of one token.
WINDOW_BACKENDS = ("fa3", "fa4", "flashinfer", "triton", "torch_native", "intel_amx")
# For which SGLang has one pool, windows and all, and which have been tried with a pool for each.
SPLIT_BY_SPARK = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")


def row_layers(model_config: Any) -> list[int]:
    """Global ids of a model's layers whose cache is rows: those that attend to the whole context.

    A hybrid model's other layers attend to a window or keep a state, in pools of SGLang's own.
    """
    if model_config.is_hybrid_swa:
        return model_config.full_attention_layer_ids
    if (hybrid := mambaish_config(model_config)) is not None:
        return hybrid.full_attention_layer_ids
    return list(range(model_config.num_attention_layers))


def split_pool(server_args: Any) -> None:
    """Have SGLang give a model's windows a pool of their own where it can and by default does not.

    In one pool the window layers keep the whole context, and compressing the others saves next to nothing. SGLang
    splits the pool of any model whose configuration has ``is_hybrid_swa`` and ``hybrid_layer_pattern``
    (configs/model_config.py); ``disable_hybrid_swa_memory``, which it declares for these models, is declared back.
    """
    model_config = model_config_of(server_args)
    if model_config.hf_config.architectures[0] not in SPLIT_BY_SPARK or server_args.disable_hybrid_swa_memory:
        return
    if not model_config.is_hybrid_swa:
        config = model_config.hf_text_config
        pattern = [int(kind == "sliding_attention") for kind in config.layer_types]
        change = {"is_hybrid_swa": True, "hybrid_layer_pattern": pattern}
        if config is not model_config.hf_config:
            change = {"text_config": change}
        asked = json.loads(resolving_view(server_args).json_model_override_args)
        declare_resolution(server_args, SOURCE, json_model_override_args=json.dumps(_merged(asked, change)))
        # Made of the arguments as they were.
        server_args._model_config = None
    declare_resolution(server_args, SOURCE, disable_hybrid_swa_memory=False)


def _merged(asked: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {
        **asked,
        **{key: {**asked.get(key, {}), **value} if isinstance(value, dict) else value for key, value in change.items()},
    }


def window_backend(server_args: Any) -> str | None:
    """The backend of SGLang's that serves a model's window layers: as asked, or its own choice; None without any."""
    model_config = model_config_of(server_args)
    if not model_config.is_hybrid_swa:
        return None
    if server_args.spark_window_backend is not None:
        return server_args.spark_window_backend
    if resolving_view(server_args).device == "cpu":
        return "intel_amx" if cpu_has_amx_support() else "torch_native"
    # Of its other choices, some take pages of 32 tokens and more only, and one no sinks.
    default = get_default_attn_backend(server_args, False, model_config)
    return default if default == "fa3" else "triton"
