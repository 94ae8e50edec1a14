"""The servers to compare, and the model they serve."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from local_server import RECALL_MODEL

_SPARK = ("--kv-compress", "spark")
# The recipes of docs/accuracy.md by their names there.
SERVERS = {
    "dense": (),
    "dense-fp8": ("--kv-cache-dtype", "fp8_e4m3"),
    "spark-accurate": (*_SPARK, "--spark-restore-bits", "4"),
    "spark": _SPARK,
    "spark-small": (*_SPARK, "--spark-restore-bits", "2", "--spark-value-dtype", "int3"),
}
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "dtype": "bfloat16",
    "eos_token_id": 128001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


@contextmanager
def model_folder(model_path: str | None, device: str) -> Iterator[str]:
    """The model asked for, or by default the recall model on a CPU and the dummy one on a GPU."""
    if model_path is not None:
        yield model_path
    elif device == "cpu":
        yield str(RECALL_MODEL)
    else:
        with tempfile.TemporaryDirectory() as folder:
            make_dummy_model(Path(folder))
            yield folder


def make_dummy_model(folder: Path) -> None:
    """Configuration and tokenizer of a model without weights: one word per token of Llama-3.1-8B's vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.joinpath("config.json").write_text(json.dumps(LLAMA_3_1_8B, indent=1))
    words = {f"t{number}": number for number in range(LLAMA_3_1_8B["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bos, eos = (f"t{LLAMA_3_1_8B[name]}" for name in ("bos_token_id", "eos_token_id"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token="t0",
        model_max_length=LLAMA_3_1_8B["max_position_embeddings"],
    ).save_pretrained(folder)


def model_flags(model_path: str | None, device: str, seed: int) -> tuple[str, ...]:
    """Flags that every server needs for the model of `model_folder`."""
    common: tuple[str, ...] = ("--random-seed", str(seed))
    if device == "cpu":
        return (*common, "--device", "cpu")
    return common if model_path is not None else (*common, "--load-format", "dummy")
