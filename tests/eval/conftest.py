import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval.cache import load_model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A folder with a Llama of 2 layers and random weights, large enough for next tokens that differ."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, max_position_embeddings=4096, initializer_range=0.3))
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def model(model_path):
    return load_model(model_path)


@pytest.fixture
def ids():
    return torch.randint(97, (96,), generator=torch.Generator().manual_seed(1)).tolist()
