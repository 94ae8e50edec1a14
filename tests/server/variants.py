"""The bundled model written down in other ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from local_server import RECALL_MODEL


def write_untied_model(folder: Path) -> Path:
    """Its output matrix apart from its embeddings: SGLang cannot split it into stages otherwise. Says the same."""
    _copy(folder, tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_looped_model(folder: Path) -> Path:
    """Its layers run through twice, each time with a cache of their own. Says other things."""
    _copy(folder, architectures=["NanbeigeForCausalLM"], model_type="nanbeige", num_loops=2, rope_theta=500000.0)
    return folder


def write_model_of_other_weights(folder: Path) -> Path:
    """The same shape; its keys and values are others. Says other things."""
    _copy(folder)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = -weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_unevenly_sharded_model(folder: Path) -> Path:
    """A configuration for random weights: three KV heads, and a cache in fp8."""
    shape = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 288}
    fp8_cache = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["*"]}
    fp8_cache["kv_cache_scheme"] = {"type": "float", "num_bits": 8}
    _copy(folder, **shape, quantization_config=fp8_cache)
    (folder / "model.safetensors").unlink()
    return folder


def write_gemma3(folder: Path) -> Path:
    """A Gemma 3 of random weights with the tokenizer of the bundled model, and windows of 64 tokens."""
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    return _write_random(folder, "gemma3_text", layer_types=layers, sliding_window=64, query_pre_attn_scalar=64)


def write_gpt_oss(folder: Path) -> Path:
    """A gpt-oss of random weights with the same tokenizer: windows of 64 tokens, and sinks in every layer."""
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    _write_random(folder, "gpt_oss", layer_types=layers, sliding_window=64, **experts)
    # SGLang reads it, and Transformers has it in its code.
    return _with(folder, swiglu_limit=7.0)


def write_qwen3_next(folder: Path) -> Path:
    """A Qwen3-Next of random weights with the same tokenizer: every third layer attends, the others keep a state."""
    shape = {"full_attention_interval": 3, "num_experts": 4, "num_experts_per_tok": 2}
    shape |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    shape |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    shape |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    _write_random(folder, "qwen3_next", tie_word_embeddings=False, **shape)
    # Transformers writes the layers' types instead of it, and SGLang reads it.
    return _with(folder, full_attention_interval=3)


def _with(folder: Path, **settings: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def _write_random(folder: Path, model_type: str, **shape: Any) -> Path:
    shutil.copytree(RECALL_MODEL, folder, ignore=shutil.ignore_patterns("config.json", "model.safetensors"))
    bundled = json.loads((RECALL_MODEL / "config.json").read_text())
    same = {name: bundled[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    same |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "head_dim": 64}
    same |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **same, initializer_range=0.15, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        # What layers say must outweigh the token that is there, else the model repeats it.
        if "norm" in name and parameter.dim() == 1:
            parameter.data = torch.rand_like(parameter) * 3
    model.save_pretrained(folder)
    return folder


def _copy(folder: Path, **changes: Any) -> None:
    shutil.copytree(RECALL_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
