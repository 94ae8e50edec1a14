"""Model folders that hold a config.json and nothing else: enough for SGLang to resolve its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "head_dim": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 128},
    "llama-head-dim-72": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 72},
    "llama-head-dim-80": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 80},
    "llama-group-20": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 128,
        "hidden_size": 2560,
        "num_attention_heads": 40,
    },
    "llama-head-dim-512": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 512},
    "llama-3-kv-heads": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 128,
        "hidden_size": 288,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "llama-fp8-cache": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 128,
        "quantization_config": {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "kv_cache_scheme": {"type": "float", "num_bits": 8},
        },
    },
    "deepseek-mla": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
    },
    "gpt-oss-swa": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "head_dim": 64,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    # A window in the configuration, and full attention in SGLang.
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 64,
        "sliding_window": 512,
    },
    "phi3": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": 2047, "pad_token_id": 0},
    "qwen2-moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "use_sliding_window": False,
        "sliding_window": 0,
    },
    "llama-window-0": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 128,
        "sliding_window": 0,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 64,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3-nested": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {
            **_SMALL,
            "model_type": "gemma3_text",
            "head_dim": 64,
            "sliding_window": 512,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "vision_config": {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    },
    "mimo-windows-only": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 64,
        "is_hybrid_swa": True,
        "hybrid_layer_pattern": [1, 1, 1, 1],
        "sliding_window": 128,
    },
    "llama4-pattern": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 128,
        "attention_chunk_size": 256,
        "is_hybrid_swa": True,
        "hybrid_layer_pattern": [1, 1, 1, 0],
    },
    "cohere2": {
        "architectures": ["Cohere2ForCausalLM"],
        "model_type": "cohere2",
        "head_dim": 64,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "llama4-chunks": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 128,
        "attention_chunk_size": 256,
    },
    "nanbeige-looped": {
        "architectures": ["NanbeigeForCausalLM"],
        "model_type": "nanbeige",
        "head_dim": 64,
        "num_loops": 2,
    },
    "loopcoder": {
        "architectures": ["IQuestLoopCoderForCausalLM"],
        "model_type": "llama",
        "head_dim": 64,
        "loop_num": 2,
    },
    "minimax-m3-sparse": {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "model_type": "llama",
        "head_dim": 128,
    },
    "qsa": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 128, "indexer_n_heads": 4},
    "qwen2-1m": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dual_chunk_attention_config": {"chunk_size": 256, "local_size": 32, "original_max_position_embeddings": 1024},
    },
    "whisper": {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    },
    "qwen3-next-linear": {**_QWEN3_NEXT, "full_attention_interval": 2},
    "qwen3-next-windows": {
        **_QWEN3_NEXT,
        "full_attention_interval": 2,
        "is_hybrid_swa": True,
        "hybrid_layer_pattern": [1, 0, 1, 0],
    },
    "qwen3-next-states": {**_QWEN3_NEXT, "full_attention_interval": 8},
    "llama-embedding": {"architectures": ["LlamaEmbeddingModel"], "model_type": "llama", "head_dim": 128},
}


def write_model(folder: Path, name: str) -> Path:
    """Write the config of ``CONFIGS[name]`` into ``folder / name`` and return that folder."""
    model = folder / name
    model.mkdir()
    (model / "config.json").write_bytes(orjson.dumps({**_SMALL, **CONFIGS[name]}))
    return model
