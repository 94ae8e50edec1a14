"""What SparK serves with: one table of what it refuses, each with its reason and what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.configs.model_config import AttentionArch

from sglang_spark import adapters
from spark_kernels.gpu import HEAD_DIMS, MAX_GROUP
from spark_kernels.implementation import runs_triton

BACKEND = "spark"
VALUE_CACHE_DTYPES = ("auto", "fp8_e4m3")


@dataclass(frozen=True)
class Launch:
    """What is about to be served.

    Parameters
    ----------
    requested
        Arguments as the user gave them, by field name.
    resolved
        Arguments as SGLang has resolved them so far.
    model_config
        SGLang's ``ModelConfig`` of the model.
    """

    requested: dict[str, Any]
    resolved: Any
    model_config: Any

    def setting(self, field: str) -> Any:
        """A resolved argument; None where this release of SGLang does not have it, so that nobody can ask for it."""
        return None if field in adapters.ABSENT_SETTINGS else getattr(self.resolved, field)


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
    offending: Callable[[Launch], Any]
    why: str
    instead: str

    def message(self, value: Any) -> str:
        return f"{self.setting}={value}: {self.why}. {self.instead}"


def _switched_on(field: str) -> Callable[[Launch], Any]:
    return lambda launch: launch.setting(field) or None


def _above_one(field: str) -> Callable[[Launch], Any]:
    return lambda launch: size if (size := launch.setting(field)) is not None and size > 1 else None


def _other_backend(field: str) -> Callable[[Launch], Any]:
    return lambda launch: launch.requested[field] if launch.requested[field] not in (None, BACKEND) else None


def _model_is(predicate: Callable[[Any], Any]) -> Callable[[Launch], Any]:
    def offending(launch: Launch) -> Any:
        if not predicate(launch.model_config):
            return None
        return (launch.model_config.hf_config.architectures or ["unknown"])[0]

    return offending


def _kv_cache_dtype(launch: Launch) -> Any:
    dtype = launch.resolved.kv_cache_dtype
    return dtype if dtype not in VALUE_CACHE_DTYPES else None


def _two_value_dtypes(launch: Launch) -> Any:
    asked_twice = launch.requested["spark_value_dtype"] == "int4" and launch.requested["kv_cache_dtype"] != "auto"
    return "int4" if asked_twice else None


def _without_kernels(launch: Launch) -> Any:
    return launch.resolved.device if launch.resolved.device not in ("cpu", "cuda") else None


def _head_dim_without_gpu_kernels(launch: Launch) -> Any:
    model = launch.model_config
    unserved = [head_dim for head_dim in (model.head_dim, model.v_head_dim) if head_dim not in HEAD_DIMS]
    return unserved[0] if unserved and _runs_triton(launch) else None


def _group_without_gpu_kernels(launch: Launch) -> Any:
    model = launch.model_config
    group = model.num_attention_heads // model.get_total_num_kv_heads()
    return group if group > MAX_GROUP and _runs_triton(launch) else None


def _runs_triton(launch: Launch) -> bool:
    return runs_triton(torch.device(launch.resolved.device))


def _whole_prefill_graphs(launch: Launch) -> Any:
    config = launch.setting("cuda_graph_config")
    return "full" if config is not None and config.prefill.backend == "full" else None


def _sglang_canary(launch: Launch) -> Any:
    canary = launch.setting("kv_canary")
    return canary if canary != "none" else None


def _disaggregated(launch: Launch) -> Any:
    mode = launch.resolved.disaggregation_mode
    return mode if mode != "null" else None


_ONE_BACKEND = "only SparK's own attention backend reads its rows"
_LEAVE_OUT = "Leave the flag out"
_SERVE_DENSE = "Serve this model with --kv-compress none"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "model with multi-head latent attention",
        _model_is(lambda model: model.attention_arch == AttentionArch.MLA),
        "its cache holds latents shared by all heads, not keys with channels to prune",
        _SERVE_DENSE,
    ),
    Refusal(
        "model with sliding-window or chunked local attention",
        _model_is(
            lambda model: (
                model.is_hybrid_swa or model.sliding_window_size is not None or model.attention_chunk_size is not None
            )
        ),
        "its layers use several pools or look at a window only, which the SparK pool and backend do not do",
        _SERVE_DENSE,
    ),
    Refusal(
        "model with linear-attention or state-space layers",
        # By name: 0.5.18 and older have no such member.
        _model_is(lambda model: adapters.pools.has_hybrid_layers(model) or model.attention_arch.name == "SSM"),
        "its layers use a hybrid pool, which SparK does not build",
        _SERVE_DENSE,
    ),
    Refusal(
        "encoder-decoder model",
        _model_is(lambda model: model.is_encoder_decoder),
        "cross-attention reads a cache that no decoder query selects channels for",
        _SERVE_DENSE,
    ),
    Refusal(
        "embedding or reward model",
        _model_is(lambda model: not model.is_generation),
        "it never decodes, so there is no cache to read back",
        _SERVE_DENSE,
    ),
    Refusal("--attention-backend", _other_backend("attention_backend"), _ONE_BACKEND, _LEAVE_OUT),
    Refusal("--prefill-attention-backend", _other_backend("prefill_attention_backend"), _ONE_BACKEND, _LEAVE_OUT),
    Refusal("--decode-attention-backend", _other_backend("decode_attention_backend"), _ONE_BACKEND, _LEAVE_OUT),
    Refusal(
        "--kv-cache-dtype",
        _kv_cache_dtype,
        "SparK stores values in the model's dtype, in fp8_e4m3 or, by --spark-value-dtype, in int4",
        f"Use one of {', '.join(VALUE_CACHE_DTYPES)}",
    ),
    Refusal(
        "--spark-value-dtype",
        _two_value_dtypes,
        "--kv-cache-dtype asks for another dtype of the same values",
        "Leave one of the two flags out",
    ),
    Refusal(
        "--device",
        _without_kernels,
        "SparK has kernels for cuda and cpu",
        "Use one of these, or serve with --kv-compress none",
    ),
    Refusal(
        "model's head_dim on a GPU",
        _head_dim_without_gpu_kernels,
        f"SparK's GPU kernels take {', '.join(map(str, HEAD_DIMS))}",
        _SERVE_DENSE,
    ),
    Refusal(
        "model's query heads per KV head on a GPU",
        _group_without_gpu_kernels,
        f"SparK's GPU kernels take at most {MAX_GROUP}",
        _SERVE_DENSE,
    ),
    Refusal(
        "--cuda-graph-backend-prefill",
        _whole_prefill_graphs,
        "SparK plans each prefill batch on the host, which one graph of the whole prefill cannot repeat",
        "Use breakable, tc_piecewise or disabled",
    ),
    Refusal(
        "--speculative-algorithm",
        _switched_on("speculative_algorithm"),
        "verifying a draft tree needs attention masks that the SparK kernels do not take",
        _LEAVE_OUT,
    ),
    Refusal(
        "--dcp-size",
        _above_one("dcp_size"),
        "decode context parallelism splits a request's tokens over ranks, and SparK's decode does not merge them",
        "Use --dcp-size 1",
    ),
    Refusal(
        "--attn-cp-size",
        _above_one("attn_cp_size"),
        "prefill context parallelism hands each rank a part of the chunk whose queries choose the channels",
        "Use --attn-cp-size 1",
    ),
    Refusal(
        "--enable-hierarchical-cache",
        _switched_on("enable_hierarchical_cache"),
        "HiCache keeps rows in pinned host memory, which takes an accelerator; with one it has not been verified yet",
        _LEAVE_OUT,
    ),
    Refusal(
        "--disaggregation-mode",
        _disaggregated,
        "the transfer of compressed rows between servers has not been verified",
        "Use --disaggregation-mode null",
    ),
    Refusal(
        "--enable-page-major-kv-layout",
        _switched_on("enable_page_major_kv_layout"),
        "SparK's rows lie layer by layer",
        _LEAVE_OUT,
    ),
    Refusal(
        "--enable-unified-memory",
        _switched_on("enable_unified_memory"),
        "the unified pool allocates dense keys",
        _LEAVE_OUT,
    ),
    Refusal(
        "--enable-hisparse",
        _switched_on("enable_hisparse"),
        "it replaces the same pool",
        _LEAVE_OUT,
    ),
    Refusal(
        "--prefill-only-disable-kv-cache",
        _switched_on("prefill_only_disable_kv_cache"),
        "without a cache there is nothing to compress",
        "Leave one of the two flags out",
    ),
    Refusal(
        "--enable-pdmux",
        _switched_on("enable_pdmux"),
        "prefill and decode would share one SparK backend on two streams",
        _LEAVE_OUT,
    ),
    Refusal(
        "--enable-two-batch-overlap",
        _switched_on("enable_two_batch_overlap"),
        "two half batches would share one SparK backend",
        _LEAVE_OUT,
    ),
    Refusal(
        "--kv-canary",
        _sglang_canary,
        "SGLang's canary hashes dense keys, and of one layer only",
        "Set SGLANG_SPARK_CANARY=1 in the environment, which hashes every row of every layer",
    ),
    Refusal(
        "--dllm-algorithm",
        _switched_on("dllm_algorithm"),
        "diffusion decoding rewrites tokens whose keys are already pruned",
        _LEAVE_OUT,
    ),
)


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
