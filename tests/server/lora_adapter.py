"""A LoRA adapter for the bundled model, of random weights: it has to change answers, not improve them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from local_server import RECALL_MODEL

RANK = 4
TARGETS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads", "v_proj": "num_key_value_heads"}


def write_adapter(folder: Path) -> Path:
    """Write the adapter in the layout of the PEFT library and return its folder.

    Keys and queries are among the targets, so the adapter changes what is cached and which channels are kept.
    """
    config = json.loads((RECALL_MODEL / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for target, heads in TARGETS.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{target}"
            shape_a, shape_b = (RANK, config["hidden_size"]), (config[heads] * config["head_dim"], RANK)
            weights[f"{name}.lora_A.weight"] = torch.randn(shape_a, generator=generator) * 0.1
            weights[f"{name}.lora_B.weight"] = torch.randn(shape_b, generator=generator) * 0.1
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "base_model_name_or_path": str(RECALL_MODEL),
                "r": RANK,
                "lora_alpha": 2 * RANK,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": list(TARGETS),
                "task_type": "CAUSAL_LM",
            }
        )
    )
    return folder
