"""Whatever SparK cannot honour stops the launch, with the setting at fault, the reason and what would work."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sglang_spark import conditions
from sglang_spark.refusals import MODEL_REFUSALS, REFUSALS

ALONE = {"SGLANG_PLUGINS": "spark"}

# What SGLang asks of models with states where its kernels for them cannot run.
WITHOUT_FLA = ("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule")

# For each row of the table, a model and flags that run into it, and the flags that its remedy puts in their place.
LAUNCHES = {
    "model with multi-head latent attention": ("deepseek-mla", (), None),
    "model with sliding windows in one pool": ("cohere2", (), None),
    "model with window layers only": ("mimo-windows-only", (), None),
    "backend of attention to chunks": (
        "llama4-pattern",
        ("--device", "cuda", "--spark-window-backend", "triton"),
        None,
    ),
    "backend of attention sinks": ("gpt-oss-swa", ("--attention-backend", "intel_amx"), None),
    "--spark-window-backend": ("llama", ("--spark-window-backend", "triton"), ()),
    "model with state-space layers only": ("qwen3-next-states", (), None),
    "model with linear attention and window layers": ("qwen3-next-windows", (), None),
    "model with linear attention on a Blackwell GPU": ("qwen3-next-linear", ("--device", "cuda"), None),
    "model with sparse attention": ("minimax-m3-sparse", (), None),
    "model with dual chunk attention": ("qwen2-1m", (), None),
    "encoder-decoder model": ("whisper", (), None),
    "embedding or reward model": ("llama-embedding", (), None),
    "--model-impl": ("llama", ("--model-impl", "transformers"), None),
    "model's head_dim on a GPU": ("llama-head-dim-80", ("--device", "cuda"), None),
    "model's query heads per KV head on a GPU": ("llama-group-20", ("--device", "cuda"), None),
    "--device": ("llama", ("--device", "xpu"), ("--device", "cpu")),
    "AMD GPU": ("llama", ("--device", "cuda"), None),
    "compute capability of the GPU": ("llama", ("--device", "cuda"), None),
    "--attention-backend": ("llama", ("--attention-backend", "torch_native"), ()),
    "--prefill-attention-backend": ("llama", ("--prefill-attention-backend", "triton"), ()),
    "--decode-attention-backend": ("llama", ("--decode-attention-backend", "triton"), ()),
    "--kv-cache-dtype": (
        "llama",
        ("--kv-cache-dtype", "fp8_e5m2"),
        ("--kv-cache-dtype", "fp8_e4m3", "--spark-value-dtype", "auto"),
    ),
    "--spark-value-dtype": (
        "llama",
        ("--kv-cache-dtype", "fp8_e4m3"),
        ("--kv-cache-dtype", "fp8_e4m3", "--spark-value-dtype", "auto"),
    ),
    "--quantization-param-path": (
        "llama",
        ("--quantization-param-path", "scales.json"),
        ("--quantization-param-path", "s.json", "--kv-cache-dtype", "fp8_e4m3", "--spark-value-dtype", "auto"),
    ),
    "--cuda-graph-backend-prefill": (
        "llama",
        ("--device", "cuda", "--cuda-graph-backend-prefill", "full"),
        ("--device", "cuda", "--cuda-graph-backend-prefill", "breakable"),
    ),
    "--startup-weight-load-mode": (
        "llama",
        ("--startup-weight-load-mode", "overlap"),
        ("--startup-weight-load-mode", "serial"),
    ),
    "--enable-torch-compile": ("llama", ("--enable-torch-compile",), ()),
    "--enable-deterministic-inference": ("llama", ("--enable-deterministic-inference",), ()),
    "--rl-on-policy-target": ("llama", ("--rl-on-policy-target", "fsdp"), ()),
    "--enable-mis": ("llama", ("--enable-mis",), ()),
    "--speculative-algorithm": (
        "llama",
        ("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", "draft"),
        ("--speculative-algorithm", "NGRAM"),
    ),
    "--speculative-algorithm NGRAM for a hybrid model": ("gemma3", ("--speculative-algorithm", "ngram"), ()),
    "--decoupled-spec-role": ("llama", ("--decoupled-spec-role", "verifier"), ("--decoupled-spec-role", "null")),
    "--dcp-size": ("llama", ("--dcp-size", "2", "--tp-size", "2"), ("--dcp-size", "1", "--tp-size", "2")),
    "--attn-cp-size": ("llama", ("--attn-cp-size", "2", "--tp-size", "2"), ("--attn-cp-size", "1", "--tp-size", "2")),
    "--enable-hierarchical-cache": ("llama", ("--enable-hierarchical-cache",), ()),
    "--enable-unified-cache-external-linker": ("llama", ("--enable-unified-cache-external-linker",), ()),
    "--enable-lmcache": ("llama", ("--enable-lmcache",), ()),
    "--enable-flexkv": ("llama", ("--enable-flexkv",), ()),
    "--radix-cache-backend": ("llama", ("--radix-cache-backend", "theirs"), ()),
    "--disaggregation-mode": ("llama", ("--disaggregation-mode", "decode"), ("--disaggregation-mode", "null")),
    "--encoder-only": ("llama", ("--encoder-only",), ()),
    "--enable-page-major-kv-layout": ("llama", ("--enable-page-major-kv-layout",), ()),
    "--enable-unified-memory": ("llama", ("--enable-unified-memory",), ()),
    "--enable-hisparse": ("llama", ("--enable-hisparse",), ()),
    "--prefill-only-disable-kv-cache": ("llama", ("--prefill-only-disable-kv-cache", "--is-embedding"), ()),
    "--enable-pdmux": ("llama", ("--enable-pdmux",), ()),
    "--enable-two-batch-overlap": ("llama", ("--enable-two-batch-overlap",), ()),
    "--kv-canary": ("llama", ("--kv-canary", "raise"), ()),
    "--dllm-algorithm": ("llama", ("--dllm-algorithm", "LowConfidence"), ()),
}
REMEDIES = {setting: instead for setting, (_, _, instead) in LAUNCHES.items() if instead is not None}


@pytest.fixture
def spark(resolve):
    """A function from a model and flags to what SGLang resolves with SparK, on the CPU unless a flag says otherwise."""

    def resolved(*flags: str, model: str = "llama"):
        device = () if "--device" in flags else ("--device", "cpu")
        return resolve("--kv-compress", "spark", *device, *flags, model=model)

    return resolved


@pytest.fixture(autouse=True)
def gpu(request, monkeypatch):
    """The GPUs that two of the rows are about."""
    setting = getattr(request.node, "callspec", None) and request.node.callspec.id
    if setting == "model with linear attention on a Blackwell GPU":
        monkeypatch.setattr(conditions, "get_platform", lambda: SimpleNamespace(is_blackwell=True))
    if setting == "AMD GPU":
        monkeypatch.setattr(torch.version, "hip", "6.4")
    if setting == "compute capability of the GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: [(9, 0), (7, 5)][index or 0])


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.setting)
def test_launch_is_refused_with_setting_reason_and_remedy(refusal, spark):
    model, flags, _ = LAUNCHES[refusal.setting]
    with pytest.raises(ValueError) as error:
        spark(*flags, model=model)
    assert f"\n  {refusal.setting}=" in str(error.value)
    assert refusal.why in str(error.value)
    assert refusal.instead in str(error.value)


@pytest.mark.parametrize(("setting", "instead"), REMEDIES.items(), ids=REMEDIES)
def test_the_remedy_is_served(setting, instead, spark):
    model = LAUNCHES[setting][0]
    assert spark(*instead, model=model)["attention_backend"] == "spark"


def test_remedies_without_a_launch_are_to_serve_dense():
    dense = {row.setting for row in REFUSALS if row.instead.endswith("--kv-compress none")}
    assert set(LAUNCHES) - set(REMEDIES) == dense - {"--device"}
    assert {row.setting for row in MODEL_REFUSALS} <= dense


@pytest.mark.skipif(os.environ.get("SGLANG_PLUGINS") == "spark", reason="this is what runs it")
def test_all_of_this_with_no_other_plugin():
    """In a process of its own: the CPU host's plugin changes settings, too, and must not be what refuses them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=os.environ | ALONE, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_linear_attention_is_served(spark):
    assert spark(*WITHOUT_FLA, model="qwen3-next-linear")["attention_backend"] == "spark"


@pytest.mark.parametrize("model", ["mistral", "phi3", "qwen2-moe", "llama-window-0", "nanbeige-looped"])
def test_windows_that_sglang_ignores_and_loops_are_served(model, spark):
    assert spark(model=model)["attention_backend"] == "spark"


@pytest.mark.parametrize("model", ["cohere2", "llama4-chunks", "loopcoder"])
@pytest.mark.parametrize("flags", [(), ("--disable-hybrid-swa-memory",)], ids=["", "one pool"])
def test_windows_in_one_pool_are_refused(flags, model, spark):
    with pytest.raises(ValueError, match="model with sliding windows in one pool="):
        spark(*flags, model=model)


@pytest.mark.parametrize("model", ["gemma3", "gemma3-nested", "gpt-oss-swa"])
def test_a_pool_for_windows_is_served_and_one_for_all_is_refused(model, spark):
    cuda = ("--device", "cuda")
    arguments = spark(*cuda, model=model)
    assert (arguments["attention_backend"], arguments["spark_window_backend"]) == ("spark", "triton")
    assert not arguments["disable_hybrid_swa_memory"]
    assert spark(*cuda, "--spark-window-backend", "fa3", model=model)["spark_window_backend"] == "fa3"
    with pytest.raises(ValueError, match=r"model with sliding windows in one pool=.*Leave --disable-hybrid-swa-memory"):
        spark(*cuda, "--disable-hybrid-swa-memory", model=model)


def test_a_sparse_indexer_is_refused(spark):
    with pytest.raises(ValueError, match="model with sparse attention=LlamaForCausalLM"):
        spark(model="qsa")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_devices_with_kernels_are_served(device, spark):
    assert spark("--device", device)["attention_backend"] == "spark"


@pytest.mark.parametrize("model", ["llama-head-dim-80", "llama-group-20"])
def test_shapes_that_only_gpu_kernels_lack_are_served_on_the_cpu(model, spark):
    assert spark(model=model)["attention_backend"] == "spark"


def test_cuda_graphs_on_cuda_are_sglangs_to_choose(spark, resolve):
    flags = ("--device", "cuda", "--cuda-graph-backend-decode", "full", "--cuda-graph-backend-prefill", "breakable")
    dense = resolve(*flags, "--attention-backend", "triton")
    assert spark(*flags)["cuda_graph_config"] == dense["cuda_graph_config"]
