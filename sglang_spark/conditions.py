"""What is about to be served, and the conditions under which SparK refuses it.

A condition takes a `Launch` and returns the value at fault, or None where there is nothing to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.configs.hybrid_arch import hybrid_gdn_config, mambaish_config
from sglang.srt.configs.model_config import AttentionArch, ModelImpl, is_hybrid_swa_model
from sglang.srt.model_loader.utils import get_resolved_model_impl
from sglang.srt.runtime_context import get_platform

from sglang_spark.hybrid import WINDOW_BACKENDS, window_backend
from spark_kernels.gpu import HEAD_DIMS, MAX_GROUP
from spark_kernels.implementation import runs_triton

BACKEND = "spark"
DEVICES = ("cuda", "cpu")
VALUE_CACHE_DTYPES = ("auto", "fp8_e4m3")
# Of NVIDIA GPUs; older ones have no bfloat16.
MIN_COMPUTE_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Launch:
    """What is about to be served.

    Parameters
    ----------
    record
        The arguments that are being resolved.
    requested
        Arguments as the user gave them, by field name.
    resolved
        Arguments as SGLang has resolved them so far.
    model_config
        SGLang's ``ModelConfig`` of the model.
    """

    record: Any
    requested: dict[str, Any]
    resolved: Any
    model_config: Any


Condition = Callable[[Launch], Any]


def switched_on(field: str) -> Condition:
    return lambda launch: getattr(launch.resolved, field) or None


def above_one(field: str) -> Condition:
    return lambda launch: size if (size := getattr(launch.resolved, field)) is not None and size > 1 else None


def not_in(field: str, allowed: Collection[Any]) -> Condition:
    return lambda launch: value if (value := getattr(launch.resolved, field)) not in allowed else None


def other_backend(field: str) -> Condition:
    return lambda launch: launch.requested[field] if launch.requested[field] not in (None, BACKEND) else None


def model_is(predicate: Callable[[Any], Any]) -> Condition:
    """The model's architecture where ``predicate(model_config)`` holds."""
    return lambda launch: architecture(launch.model_config) if predicate(launch.model_config) else None


def architecture(model: Any) -> str:
    return (model.hf_config.architectures or ["unknown"])[0]


def is_latent(model: Any) -> bool:
    return model.attention_arch == AttentionArch.MLA


def has_states_only(model: Any) -> bool:
    hybrid = mambaish_config(model)
    return model.attention_arch == AttentionArch.SSM or (hybrid is not None and not hybrid.full_attention_layer_ids)


def has_states_and_windows(model: Any) -> bool:
    return mambaish_config(model) is not None and model.is_hybrid_swa


def linear_attention_on_blackwell(launch: Launch) -> Any:
    """SGLang's own list of backends that serve beside gated delta nets there (``attn_backend_wrapper``)."""
    is_refused = launch.resolved.device == "cuda" and get_platform().is_blackwell
    return architecture(launch.model_config) if is_refused and hybrid_gdn_config(launch.model_config) else None


def has_windows_in_one_pool(model: Any) -> bool:
    """Whether SGLang serves the model with windows, and with one pool for all its layers.

    ``sliding_window`` alone, as of Mistral or Phi-3, says nothing.

    SGLang's own rule (``resolve_sliding_window_size``) asks the loaded model. What its models read is this: their
    names, ``attention_chunk_size`` and the types of their layers. Of a LoopCoder all loops but the first have windows.
    """
    config = model.hf_text_config
    return not model.is_hybrid_swa and (
        is_hybrid_swa_model(model.hf_config.architectures, config)
        or model.attention_chunk_size is not None
        or "sliding_attention" in (getattr(config, "layer_types", None) or ())
        or architecture(model) == "IQuestLoopCoderForCausalLM"
    )


def has_windows_only(model: Any) -> bool:
    return model.is_hybrid_swa and not is_latent(model) and not model.full_attention_layer_ids


def chunked_without_kernel(launch: Launch) -> Any:
    """The backend of Llama 4's layers that attend to chunks, where it would attend to everything instead."""
    backend = window_backend(launch.record)
    return backend if launch.model_config.attention_chunk_size is not None and backend != "fa3" else None


def sinks_without_kernel(launch: Launch) -> Any:
    """The backend of window layers with sinks, where it does not take any."""
    backend = window_backend(launch.record)
    return backend if launch.model_config.has_attention_sinks and backend in ("flashinfer", "torch_native") else None


def unfit_window_backend(launch: Launch) -> Any:
    asked = launch.requested["spark_window_backend"]
    return None if launch.model_config.is_hybrid_swa and asked in WINDOW_BACKENDS else asked


def drafts_of_a_model(launch: Launch) -> Any:
    algorithm = launch.resolved.speculative_algorithm
    return None if algorithm is None or _is_ngram(launch) else algorithm


def drafts_for_a_hybrid(launch: Launch) -> Any:
    is_hybrid = launch.model_config.is_hybrid_swa or mambaish_config(launch.model_config) is not None
    return architecture(launch.model_config) if is_hybrid and _is_ngram(launch) else None


def _is_ngram(launch: Launch) -> bool:
    return (launch.resolved.speculative_algorithm or "").upper() == "NGRAM"


def has_sparse_pool(model: Any) -> bool:
    """MiniMax-M3 and the models with a QSA indexer (Qwen4)."""
    indexed = getattr(model.hf_text_config, "indexer_n_heads", None) is not None
    return indexed or architecture(model).startswith("MiniMaxM3Sparse")


def has_dual_chunks(model: Any) -> bool:
    return getattr(model.hf_config, "dual_chunk_attention_config", None) is not None


def foreign_implementation(launch: Launch) -> Any:
    """The implementation that serves the model where it is not SGLang's, asked for or fallen back to."""
    implementation = get_resolved_model_impl(launch.model_config)
    return None if implementation == ModelImpl.SGLANG else implementation.value


def two_value_dtypes(launch: Launch) -> Any:
    asked_twice = launch.requested["spark_value_dtype"] != "auto" and launch.requested["kv_cache_dtype"] != "auto"
    return launch.requested["spark_value_dtype"] if asked_twice else None


def unread_scales(launch: Launch) -> Any:
    return launch.resolved.quantization_param_path if launch.resolved.kv_cache_dtype != "fp8_e4m3" else None


def amd_gpu(launch: Launch) -> Any:
    return f"ROCm {torch.version.hip}" if launch.resolved.device == "cuda" and torch.version.hip else None


def old_gpu(launch: Launch) -> Any:
    """The compute capability of the oldest visible GPU."""
    if launch.resolved.device != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    oldest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return "{}.{}".format(*oldest) if oldest < MIN_COMPUTE_CAPABILITY else None


def head_dim_without_gpu_kernels(launch: Launch) -> Any:
    model = launch.model_config
    unserved = [head_dim for head_dim in (model.head_dim, model.v_head_dim) if head_dim not in HEAD_DIMS]
    return unserved[0] if unserved and _runs_triton(launch) else None


def group_without_gpu_kernels(launch: Launch) -> Any:
    model = launch.model_config
    group = model.num_attention_heads // model.get_total_num_kv_heads()
    return group if group > MAX_GROUP and _runs_triton(launch) else None


def _runs_triton(launch: Launch) -> bool:
    return runs_triton(torch.device(launch.resolved.device))


def whole_prefill_graphs(launch: Launch) -> Any:
    config = launch.resolved.cuda_graph_config
    return "full" if config is not None and config.prefill.backend == "full" else None
