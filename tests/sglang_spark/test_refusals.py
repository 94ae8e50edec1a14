"""Whatever SparK cannot honour stops the launch, with the setting at fault, the reason and what would work."""

from __future__ import annotations

import pytest

from sglang_spark.refusals import REFUSALS

SPARK = ("--kv-compress", "spark")

# For each row of the table, a model and flags that run into it.
LAUNCHES = {
    "model with multi-head latent attention": ("deepseek-mla", ()),
    "model with sliding-window or chunked local attention": ("mistral-window", ()),
    "model with linear-attention or state-space layers": ("qwen3-next-linear", ()),
    "encoder-decoder model": ("whisper", ()),
    "embedding or reward model": ("llama-embedding", ()),
    "--attention-backend": ("llama", ("--attention-backend", "torch_native")),
    "--prefill-attention-backend": ("llama", ("--prefill-attention-backend", "triton")),
    "--decode-attention-backend": ("llama", ("--decode-attention-backend", "triton")),
    "--kv-cache-dtype": ("llama", ("--kv-cache-dtype", "fp8_e5m2")),
    "--spark-value-dtype": ("llama", ("--spark-value-dtype", "int4", "--kv-cache-dtype", "fp8_e4m3")),
    "--speculative-algorithm": ("llama", ("--speculative-algorithm", "NGRAM")),
    "--dcp-size": ("llama", ("--dcp-size", "2", "--tp-size", "2")),
    "--enable-hierarchical-cache": ("llama", ("--enable-hierarchical-cache",)),
    "--disaggregation-mode": ("llama", ("--disaggregation-mode", "decode")),
    "--enable-page-major-kv-layout": ("llama", ("--enable-page-major-kv-layout",)),
    "--enable-unified-memory": ("llama", ("--enable-unified-memory",)),
    "--enable-hisparse": ("llama", ("--enable-hisparse",)),
    "--enable-pdmux": ("llama", ("--enable-pdmux",)),
    "--enable-two-batch-overlap": ("llama", ("--enable-two-batch-overlap",)),
    "--prefill-only-disable-kv-cache": ("llama", ("--prefill-only-disable-kv-cache", "--is-embedding")),
    "--attn-cp-size": ("llama", ("--attn-cp-size", "2", "--tp-size", "2")),
    "--dllm-algorithm": ("llama", ("--dllm-algorithm", "LowConfidence")),
    "--kv-canary": ("llama", ("--kv-canary", "raise")),
    "--device": ("llama", ("--device", "xpu")),
    "model's head_dim on a GPU": ("llama-head-dim-80", ("--device", "cuda")),
    "model's query heads per KV head on a GPU": ("llama-group-20", ("--device", "cuda")),
    "--cuda-graph-backend-prefill": ("llama", ("--device", "cuda", "--cuda-graph-backend-prefill", "full")),
}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.setting)
def test_launch_is_refused_with_setting_reason_and_remedy(refusal, resolve):
    model, flags = LAUNCHES[refusal.setting]
    with pytest.raises(ValueError) as error:
        resolve(*SPARK, *flags, model=model)
    assert refusal.setting in str(error.value)
    assert refusal.why in str(error.value)
    assert refusal.instead in str(error.value)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_devices_with_kernels_are_served(device, resolve):
    assert resolve(*SPARK, "--device", device)["attention_backend"] == "spark"


@pytest.mark.parametrize("model", ["llama-head-dim-80", "llama-group-20"])
def test_shapes_that_only_gpu_kernels_lack_are_served_on_the_cpu(model, resolve):
    assert resolve(*SPARK, "--device", "cpu", model=model)["attention_backend"] == "spark"


def test_cuda_graphs_on_cuda_are_sglangs_to_choose(resolve):
    flags = ("--device", "cuda", "--cuda-graph-backend-decode", "full", "--cuda-graph-backend-prefill", "breakable")
    dense = resolve(*flags, "--attention-backend", "triton")
    assert resolve(*SPARK, *flags)["cuda_graph_config"] == dense["cuda_graph_config"]
