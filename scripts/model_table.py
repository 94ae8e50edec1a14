#!/usr/bin/env python3
"""Writes the table of docs/models.md: bytes per token and tokens on 80 GB GPUs, by the doctor, for models people serve.

Of each model only the sizes that decide about its cache are needed; they are those of its public configuration.

    python scripts/model_table.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from sglang_spark.doctor import Fit, examine_model
from tables import fill, markdown

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
GPU_GB, SHARE = 80, 0.88


class Served(NamedTuple):
    """A model, its sizes, the GB of its weights, and over how many GPUs they are split."""

    name: str
    architecture: str
    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    weights_gb: float
    gpus: int = 1
    # More of its configuration.
    more: dict[str, Any] = {}  # noqa: RUF012


def windows(window: int, layers: int, every: int) -> dict[str, Any]:
    """A window in all layers but each ``every``-th."""
    kinds = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)]
    return {"sliding_window": window, "layer_types": kinds}


LLAMA, QWEN2, QWEN3, GEMMA3 = (f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3", "Gemma3"))
GPT_OSS, NEXT = "GptOssForCausalLM", "Qwen3NextForCausalLM"
VERIFIED = (LLAMA, QWEN2, GEMMA3, NEXT, GPT_OSS)
MODELS = (
    Served("Llama-3.2-1B", LLAMA, "llama", 16, 32, 8, 64, 2048, 2.5),
    Served("Llama-3.2-3B", LLAMA, "llama", 28, 24, 8, 128, 3072, 6.4),
    Served("Llama-3.1-8B", LLAMA, "llama", 32, 32, 8, 128, 4096, 16.1),
    Served("Llama-3.3-70B", LLAMA, "llama", 80, 64, 8, 128, 8192, 141, 4),
    Served("Llama-2-7B", LLAMA, "llama", 32, 32, 32, 128, 4096, 13.5),
    Served("SmolLM2-1.7B", LLAMA, "llama", 24, 32, 32, 64, 2048, 3.4),
    Served("Qwen2.5-7B", QWEN2, "qwen2", 28, 28, 4, 128, 3584, 15.2),
    Served("Qwen2.5-32B", QWEN2, "qwen2", 64, 40, 8, 128, 5120, 65.5, 2),
    Served("Qwen2.5-72B", QWEN2, "qwen2", 80, 64, 8, 128, 8192, 145, 4),
    Served("Qwen3-8B", QWEN3, "qwen3", 36, 32, 8, 128, 4096, 16.4),
    Served("Qwen3-32B", QWEN3, "qwen3", 64, 64, 8, 128, 5120, 65.5, 2),
    Served("Qwen3-30B-A3B", "Qwen3MoeForCausalLM", "qwen3_moe", 48, 32, 4, 128, 2048, 61, 2),
    Served("Qwen3-235B-A22B", "Qwen3MoeForCausalLM", "qwen3_moe", 94, 64, 4, 128, 4096, 470, 8),
    Served("GLM-4.5-Air", "Glm4MoeForCausalLM", "glm4_moe", 46, 96, 8, 128, 4096, 221, 4),
    Served("GLM-4.5, 4.6 (fp8 weights)", "Glm4MoeForCausalLM", "glm4_moe", 92, 96, 8, 128, 5120, 360, 8),
    Served("MiniMax-M2 (fp8 weights)", "MiniMaxM2ForCausalLM", "llama", 62, 48, 8, 128, 3072, 230, 4),
    Served("Mistral-7B-v0.3", "MistralForCausalLM", "mistral", 32, 32, 8, 128, 4096, 14.5),
    Served("Mistral-Small-24B", "MistralForCausalLM", "mistral", 40, 32, 8, 128, 5120, 47.2),
    Served("Phi-4", "Phi3ForCausalLM", "phi3", 40, 40, 10, 128, 5120, 29.3),
    Served("Phi-4-mini", "Phi3ForCausalLM", "phi3", 32, 24, 8, 128, 3072, 7.7),
    Served("Gemma-3-12B", GEMMA3, "gemma3_text", 48, 16, 8, 256, 3840, 24.4, more=windows(1024, 48, 6)),
    Served("Gemma-3-27B", GEMMA3, "gemma3_text", 62, 32, 16, 128, 5376, 54.9, more=windows(1024, 62, 6)),
    Served("gpt-oss-20b", GPT_OSS, "gpt_oss", 24, 64, 8, 64, 2880, 13.8, more=windows(128, 24, 2)),
    Served("gpt-oss-120b", GPT_OSS, "gpt_oss", 36, 64, 8, 64, 2880, 65.2, more=windows(128, 36, 2)),
    Served("Qwen3-Next-80B-A3B", NEXT, "qwen3_next", 48, 16, 2, 256, 2048, 163, 4, {"full_attention_interval": 4}),
)
HEADER = ("model", "GPUs", "dense bf16", "dense fp8", "spark", "tokens, dense", "tokens, spark", "verified")


def examine(model: Served, folder: Path) -> Fit:
    """What the doctor says of one process."""
    config = {
        "architectures": [model.architecture],
        "model_type": model.model_type,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_size": model.hidden,
        "intermediate_size": 2 * model.hidden,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
        **model.more,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    memory = (SHARE * GPU_GB - model.weights_gb / model.gpus) * 1e9 / (1 << 30)
    flags = ["--device", "cuda", "--tp-size", str(model.gpus)]
    # What SGLang asks of models with states where this runs without a GPU.
    flags += ["--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule"]
    if "sliding_window" in model.more:
        flags += ["--swa-full-tokens-ratio", "0.1"]
    return examine_model(str(folder), flags, memory)


def table() -> str:
    """A line per model; bytes are per token and GPU."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(MODELS):
            fit = examine(model, Path(folder) / str(number))
            sizes = (f"{fit.bytes_per_token[cache]:,}" for cache in ("dense", "dense_fp8", "spark"))
            tokens = (f"{fit.tokens[cache]:,}" for cache in ("dense", "spark"))
            mark = "yes" if model.architecture in VERIFIED else "no"
            lines.append((model.name, str(model.gpus), *sizes, *tokens, mark))
    return markdown(HEADER, lines)


def main() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), {"models": table()}))


if __name__ == "__main__":
    main()
