"""Writes the model directory that transformers and SGLang load."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def export_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Saves bf16 weights, configuration and tokenizer; `model` itself stays as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    config = model.config
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "do_sample": True,
        "top_k": 1,
    }
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def load_exported(directory: Path) -> LlamaForCausalLM:
    """The saved, bf16-rounded weights, computing in float32."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
