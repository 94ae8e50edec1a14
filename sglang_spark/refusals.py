"""What SparK serves with: one table of what it refuses, each with its reason and what to do instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_spark import conditions
from sglang_spark.conditions import DEVICES, MIN_COMPUTE_CAPABILITY, VALUE_CACHE_DTYPES, Condition, Launch
from sglang_spark.hybrid import WINDOW_BACKENDS
from spark_kernels.gpu import HEAD_DIMS, MAX_GROUP


@dataclass(frozen=True)
class Refusal:
    """One thing SparK does not serve with.

    Parameters
    ----------
    setting
        The flag or the property of the model at fault, as the user knows it.
    offending
        Returns the setting's value where SparK must refuse it, and None where it is fine.
    why
        Reason, as a clause.
    instead
        What would work, as a sentence.
    """

    setting: str
    offending: Condition
    why: str
    instead: str = "Leave the flag out"

    def message(self, value: Any) -> str:
        return f"{self.setting}={value}: {self.why}. {self.instead}"


_ONE_BACKEND = "only SparK's own attention backend reads its rows"
_DETERMINISTIC = "what a row keeps depends on the chunk that it was written in, so answers depend on the batch"
_SERVE_DENSE = "Serve this model with --kv-compress none"

# What is asked before there is a model, by the doctor too.
DEVICE_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--device",
        conditions.not_in("device", DEVICES),
        f"SparK has kernels for {' and '.join(DEVICES)}",
        "Use one of these, or serve with --kv-compress none",
    ),
    Refusal(
        "AMD GPU", conditions.amd_gpu, "SparK's kernels have not been tried on one", "Serve with --kv-compress none"
    ),
    Refusal(
        "compute capability of the GPU",
        conditions.old_gpu,
        "SparK's GPU kernels take {}.{} and above".format(*MIN_COMPUTE_CAPABILITY),
        "Hide older GPUs with CUDA_VISIBLE_DEVICES, or serve with --kv-compress none",
    ),
)

MODEL_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "model with multi-head latent attention",
        conditions.model_is(conditions.is_latent),
        "its cache holds latents shared by all heads, not keys with channels to prune",
        _SERVE_DENSE,
    ),
    Refusal(
        "model with sliding windows in one pool",
        conditions.model_is(conditions.has_windows_in_one_pool),
        "SGLang keeps the whole context for its window layers too, so that compressing the others saves little",
        "Leave --disable-hybrid-swa-memory out where it is given, or serve this model with --kv-compress none",
    ),
    Refusal(
        "model with window layers only",
        conditions.model_is(conditions.has_windows_only),
        "its cache does not grow with the context",
        _SERVE_DENSE,
    ),
    Refusal(
        "backend of attention to chunks",
        conditions.chunked_without_kernel,
        "it would attend to everything in the layers of this model that attend to chunks",
        "Add --spark-window-backend fa3 on a Hopper GPU, or serve this model with --kv-compress none",
    ),
    Refusal(
        "backend of attention sinks",
        conditions.sinks_without_kernel,
        "it does not take the sinks of this model's window layers",
        "Add --spark-window-backend triton on a GPU, or serve this model with --kv-compress none",
    ),
    Refusal(
        "model with state-space layers only",
        conditions.model_is(conditions.has_states_only),
        "its cache does not grow with the context",
        _SERVE_DENSE,
    ),
    Refusal(
        "model with linear attention and window layers",
        conditions.model_is(conditions.has_states_and_windows),
        "its short convolutions keep states of every layer in pools that SparK does not build",
        _SERVE_DENSE,
    ),
    Refusal(
        "model with linear attention on a Blackwell GPU",
        conditions.linear_attention_on_blackwell,
        "SGLang serves its other layers with backends on a list of its own there",
        _SERVE_DENSE,
    ),
    Refusal(
        "model with sparse attention",
        conditions.model_is(conditions.has_sparse_pool),
        "its indexer keeps keys of its own and picks the tokens to attend to, which SparK's pool and backend do not do",
        _SERVE_DENSE,
    ),
    Refusal(
        "model with dual chunk attention",
        conditions.model_is(conditions.has_dual_chunks),
        "it attends with several queries per token, which SparK's backend does not do",
        _SERVE_DENSE,
    ),
    Refusal(
        "encoder-decoder model",
        conditions.model_is(lambda model: model.is_encoder_decoder),
        "cross-attention reads a cache that no decoder query selects channels for",
        _SERVE_DENSE,
    ),
    Refusal(
        "embedding or reward model",
        conditions.model_is(lambda model: not model.is_generation),
        "it never decodes, so there is no cache to read back",
        _SERVE_DENSE,
    ),
    Refusal(
        "--model-impl",
        conditions.foreign_implementation,
        "SparK checks the attention layers of SGLang's own models only; auto falls back where SGLang has none",
        _SERVE_DENSE,
    ),
    Refusal(
        "model's head_dim on a GPU",
        conditions.head_dim_without_gpu_kernels,
        f"SparK's GPU kernels take {', '.join(map(str, HEAD_DIMS))}",
        _SERVE_DENSE,
    ),
    Refusal(
        "model's query heads per KV head on a GPU",
        conditions.group_without_gpu_kernels,
        f"SparK's GPU kernels take at most {MAX_GROUP}",
        _SERVE_DENSE,
    ),
)

SETTING_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--spark-window-backend",
        conditions.unfit_window_backend,
        "it names a backend of SGLang's for the window layers of models that have some",
        f"Leave the flag out, or with such a model use one of {', '.join(WINDOW_BACKENDS)}",
    ),
    Refusal("--attention-backend", conditions.other_backend("attention_backend"), _ONE_BACKEND),
    Refusal("--prefill-attention-backend", conditions.other_backend("prefill_attention_backend"), _ONE_BACKEND),
    Refusal("--decode-attention-backend", conditions.other_backend("decode_attention_backend"), _ONE_BACKEND),
    Refusal(
        "--kv-cache-dtype",
        conditions.not_in("kv_cache_dtype", VALUE_CACHE_DTYPES),
        "SparK stores values in the model's dtype, in fp8_e4m3 or as --spark-value-dtype says",
        f"Use one of {', '.join(VALUE_CACHE_DTYPES)}",
    ),
    Refusal(
        "--spark-value-dtype",
        conditions.two_value_dtypes,
        "--kv-cache-dtype asks for another dtype of the same values",
        "Add --spark-value-dtype auto, or leave --kv-cache-dtype out",
    ),
    Refusal(
        "--quantization-param-path",
        conditions.unread_scales,
        "SGLang reads it for values in fp8_e4m3 only",
        "Add --kv-cache-dtype fp8_e4m3 --spark-value-dtype auto, or leave the flag out",
    ),
    Refusal(
        "--cuda-graph-backend-prefill",
        conditions.whole_prefill_graphs,
        "SparK plans each prefill batch on the host, which one graph of the whole prefill cannot repeat",
        "Use breakable, tc_piecewise or disabled",
    ),
    Refusal(
        "--startup-weight-load-mode",
        conditions.not_in("startup_weight_load_mode", ("serial",)),
        "what rows are made with is measured on the loaded weights, before CUDA graphs are captured",
        "Use --startup-weight-load-mode serial",
    ),
    Refusal(
        "--enable-torch-compile",
        conditions.switched_on("enable_torch_compile"),
        "torch.compile cannot trace SparK's backend",
    ),
    Refusal(
        "--enable-deterministic-inference", conditions.switched_on("enable_deterministic_inference"), _DETERMINISTIC
    ),
    Refusal("--rl-on-policy-target", conditions.switched_on("rl_on_policy_target"), _DETERMINISTIC),
    Refusal(
        "--enable-mis",
        conditions.switched_on("enable_mis"),
        "scoring several items in one sequence needs attention masks that the SparK kernels do not take",
        "Leave the flag out, which scores each item in a sequence of its own",
    ),
    Refusal(
        "--speculative-algorithm",
        conditions.drafts_of_a_model,
        "what a draft model needs of the cache has not been tried beside rows",
        "Use --speculative-algorithm NGRAM, which drafts from the text, or leave the flag out",
    ),
    Refusal(
        "--speculative-algorithm NGRAM for a hybrid model",
        conditions.drafts_for_a_hybrid,
        "layers without rows would have to verify too, which has not been tried beside rows",
    ),
    Refusal(
        "--decoupled-spec-role",
        conditions.not_in("decoupled_spec_role", ("null",)),
        "drafts that another server verifies have not been tried with rows",
        "Use --decoupled-spec-role null",
    ),
    Refusal(
        "--dcp-size",
        conditions.above_one("dcp_size"),
        "decode context parallelism splits a request's tokens over ranks, and SparK's decode does not merge them",
        "Use --dcp-size 1",
    ),
    Refusal(
        "--attn-cp-size",
        conditions.above_one("attn_cp_size"),
        "prefill context parallelism hands each rank a part of the chunk whose queries choose the channels",
        "Use --attn-cp-size 1",
    ),
    Refusal(
        "--enable-hierarchical-cache",
        conditions.switched_on("enable_hierarchical_cache"),
        "HiCache keeps rows in pinned host memory, which takes an accelerator; with one it has not been verified yet",
    ),
    Refusal(
        "--enable-unified-cache-external-linker",
        conditions.switched_on("enable_unified_cache_external_linker"),
        "storing compressed rows outside the server has not been verified",
    ),
    Refusal(
        "--enable-lmcache", conditions.switched_on("enable_lmcache"), "LMCache reads and writes dense keys of the pool"
    ),
    Refusal(
        "--enable-flexkv", conditions.switched_on("enable_flexkv"), "FlexKV reads and writes dense keys of the pool"
    ),
    Refusal(
        "--radix-cache-backend",
        conditions.switched_on("radix_cache_backend"),
        "a cache that SGLang does not bring may read or write dense keys of the pool",
    ),
    Refusal(
        "--disaggregation-mode",
        conditions.not_in("disaggregation_mode", ("null",)),
        "the transfer of compressed rows between servers has not been verified",
        "Use --disaggregation-mode null",
    ),
    Refusal(
        "--encoder-only",
        conditions.switched_on("encoder_only"),
        "an encoder has no cache to compress",
        "Leave one of the two flags out",
    ),
    Refusal(
        "--enable-page-major-kv-layout",
        conditions.switched_on("enable_page_major_kv_layout"),
        "SparK's rows lie layer by layer",
    ),
    Refusal(
        "--enable-unified-memory",
        conditions.switched_on("enable_unified_memory"),
        "the unified pool allocates dense keys",
    ),
    Refusal("--enable-hisparse", conditions.switched_on("enable_hisparse"), "it replaces the same pool"),
    Refusal(
        "--prefill-only-disable-kv-cache",
        conditions.switched_on("prefill_only_disable_kv_cache"),
        "without a cache there is nothing to compress",
        "Leave one of the two flags out",
    ),
    Refusal(
        "--enable-pdmux",
        conditions.switched_on("enable_pdmux"),
        "prefill and decode would share one SparK backend on two streams",
    ),
    Refusal(
        "--enable-two-batch-overlap",
        conditions.switched_on("enable_two_batch_overlap"),
        "two half batches would share one SparK backend",
    ),
    Refusal(
        "--kv-canary",
        conditions.not_in("kv_canary", ("none",)),
        "SGLang's canary hashes dense keys, and of one layer only",
        "Set SGLANG_SPARK_CANARY=1 in the environment, which hashes every row of every layer",
    ),
    Refusal(
        "--dllm-algorithm",
        conditions.switched_on("dllm_algorithm"),
        "diffusion decoding rewrites tokens whose keys are already pruned",
    ),
)

REFUSALS = (*DEVICE_REFUSALS, *MODEL_REFUSALS, *SETTING_REFUSALS)


def check(launch: Launch) -> None:
    """Refuse a launch that SparK cannot honour.

    Raises
    ------
    ValueError
        Lists every setting at fault, why, and what would work.
    """
    problems = [refusal.message(value) for refusal in REFUSALS if (value := refusal.offending(launch)) is not None]
    if problems:
        raise ValueError("--kv-compress spark is not possible with\n  " + "\n  ".join(problems))
