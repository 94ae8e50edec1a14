"""A calibration measured by a server, against the same model in transformers, and its life in other servers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import requests
import torch
from safetensors.torch import load_file
from servers import COMMON_FLAGS, running
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from local_server import RECALL_MODEL, LocalServer
from sglang_spark.calibration import STATISTICS
from sglang_spark.calibration_forward import offsets, token_ids

MAX_TOKENS = ("--max-total-tokens", "2048")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    output = tmp_path_factory.mktemp("calibration") / "recall.safetensors"
    command = [sys.executable, "-m", "sglang_spark.calibrate", "--model-path", str(RECALL_MODEL), "-o", str(output)]
    command += ["--dtype", "float32", *MAX_TOKENS]
    subprocess.run(command, check=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return output


def test_statistics_are_those_of_the_model(file):
    expected, found = _by_transformers(), load_file(file)
    for name in STATISTICS:
        torch.testing.assert_close(found[name], expected[name].float(), atol=1e-3, rtol=1e-3)


def test_weight_update_keeps_the_calibration_and_a_restart_measures_the_same(file):
    spark = (*COMMON_FLAGS, *MAX_TOKENS, "--kv-compress", "spark")
    measuring, reading = LocalServer(*spark), LocalServer(*spark, "--spark-calibration", str(file))
    with running(measuring, reading):
        measured, read = _calibration(measuring), _calibration(reading)
        assert measured == {"source": "auto", "fingerprint": read["fingerprint"]}
        assert read["source"] == str(file)
        update = {"model_path": str(RECALL_MODEL)}
        response = requests.post(f"{measuring.url}/update_weights_from_disk", json=update, timeout=120)
        assert response.json()["success"], response.text
        assert _calibration(measuring) == measured


def _calibration(server: LocalServer) -> dict[str, str]:
    (state,) = requests.get(f"{server.url}/server_info", timeout=60).json()["internal_states"]
    return state["spark_kv_cache"]["calibration"]


def _by_transformers() -> dict[str, torch.Tensor]:
    """The statistics from transformers' own forward of the same sequences."""
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watching(module, query, key, value, mask, **kwargs):
        seen.setdefault(module.layer_idx, []).append((query[0].double(), key[0].double()))
        return attention(module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("watching", watching)
    model = AutoModelForCausalLM.from_pretrained(RECALL_MODEL, dtype=torch.float32, attn_implementation="watching")
    sequences = token_ids(AutoTokenizer.from_pretrained(RECALL_MODEL), model.config.vocab_size)
    for ids, offset in zip(sequences, offsets(sequences, model.config.max_position_embeddings), strict=True):
        positions = torch.arange(offset, offset + len(ids))[None]
        with torch.no_grad():
            model.model(torch.tensor([ids]), position_ids=positions, use_cache=False)
    layers = [tuple(torch.cat(parts, dim=1) for parts in zip(*seen[layer], strict=True)) for layer in sorted(seen)]
    keys = torch.stack([k for _, k in layers])
    queries = torch.stack([q.unflatten(0, (k.shape[0], -1)) for q, k in layers])
    return {
        "centre": keys.mean(2),
        "deviation": keys.std(2, correction=0),
        "query_rms": queries.square().mean((2, 3)).sqrt(),
    }
