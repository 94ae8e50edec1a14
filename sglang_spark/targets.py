"""What SparK needs of SGLang, by name and signature, and the check of a release that nobody has run it with."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterable
from types import EllipsisType, ModuleType
from typing import Any, NamedTuple

from sglang_spark.releases import RUN_WITH

logger = logging.getLogger(__name__)


class UnsupportedSGLangError(RuntimeError):
    """The installed SGLang lacks something that SparK hooks into."""


class Target(NamedTuple):
    """Something of SGLang that SparK calls, wraps or overrides.

    Parameters
    ----------
    path
        Dotted path from the package on.
    parameters
        Names of its parameters in order, with their stars, and at the end ``...`` where further ones do not matter;
        None where only its presence does.
    """

    path: str
    parameters: tuple[str | EllipsisType, ...] | None = None

    def current(self) -> Any:
        """What SGLang has there at present, wrapped or not.

        Raises
        ------
        ImportError, AttributeError
            There is no such target in this SGLang.
        """
        return _resolve(self.path)

    def problem(self) -> str | None:
        """What is wrong with it in the installed release, naming it; None if nothing is."""
        try:
            found = self.current()
        except Exception as error:  # the import of a module may raise anything
            return f"{self.path} is missing ({type(error).__name__}: {error})"
        if self.parameters is None:
            return None
        # Of what a wrapper wraps, if it is wrapped.
        parameters = tuple(_starred(parameter) for parameter in inspect.signature(found).parameters.values())
        if self._accepts(parameters):
            return None
        return f"{self.path} takes ({', '.join(parameters)}) instead of ({self._expected()})"

    def _accepts(self, parameters: tuple[str, ...]) -> bool:
        if self.parameters[-1:] == (...,):
            return parameters[: len(self.parameters) - 1] == self.parameters[:-1]
        return parameters == self.parameters

    def _expected(self) -> str:
        return ", ".join("..." if name is ... else name for name in self.parameters)


_BACKEND = "sglang.srt.layers.attention.base_attn_backend.AttentionBackend"
_FORWARD = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "**kwargs")
_POOL = "sglang.srt.mem_cache.memory_pool"
_METRICS = "sglang.srt.observability.metrics_collector"
_OVERRIDES = "sglang.srt.arg_groups.overrides"

# What SparK calls or overrides; what it wraps is in `hooks.HOOKS`.
CALLED: tuple[Target, ...] = (
    Target("sglang.srt.arg_groups.arg_utils.A"),
    Target("sglang.srt.arg_groups.arg_utils.Arg"),
    Target("sglang.srt.arg_groups.arg_utils.add_cli_args_from_dataclass", ("parser", "cls", "fields")),
    Target("sglang.srt.arg_groups.arg_utils.record_fields", ("cls",)),
    Target("sglang.srt.arg_groups.choices.add_attention_backend_choices"),
    Target("sglang.srt.arg_groups.resolution_hooks.register_resolution_hook", ("name",)),
    Target(f"{_OVERRIDES}.declare_resolution", ("server_args", "source", "**fields")),
    Target(f"{_OVERRIDES}.model_config_of"),
    Target(f"{_OVERRIDES}.resolving_view"),
    Target("sglang.srt.server_args.ServerArgs.resolve_once", ("self",)),
    Target("sglang.srt.entrypoints.engine.Engine.server_args_class"),
    Target("sglang.srt.runtime_context.get_parallel", ()),
    Target("sglang.srt.model_executor.model_runner.ModelRunner._forward_raw"),
    Target("sglang.srt.model_executor.model_runner.ModelRunner._pp_kwargs", ("self", "pp_proxy_tensors")),
    Target("sglang.srt.runtime_context.get_server_args", ()),
    Target("sglang.srt.runtime_context.publish", ("server_args", "role", ...)),
    Target("sglang.srt.configs.hybrid_arch.mambaish_config", ("model_config",)),
    Target("sglang.srt.configs.hybrid_arch.hybrid_gdn_config", ("model_config",)),
    Target("sglang.srt.configs.model_config.AttentionArch.MLA"),
    Target("sglang.srt.model_loader.utils.get_resolved_model_impl", ("model_config",)),
    Target("sglang.srt.configs.model_config.is_hybrid_swa_model"),
    Target("sglang.srt.configs.update_config.adjust_config_with_unaligned_cpu_tp"),
    Target("sglang.srt.distributed.utils.get_pp_indices", ("num_hidden_layers", "pp_rank", "pp_size")),
    Target("sglang.srt.mem_cache.kv_cache_dtype.configure_kv_cache_dtype"),
    Target("sglang.srt.model_loader.loader._get_quantization_config"),
    Target("sglang.srt.constants.GPU_MEMORY_TYPE_KV_CACHE"),
    Target(f"{_POOL}.KvBufferDesc", ("name", "shape", "row_bytes", "tokens_per_row")),
    Target(f"{_POOL}.MHATokenToKVPool._create_buffers_normal", ("self",)),
    Target(f"{_POOL}.MHATokenToKVPool._build_kv_buffer_descs", ("self",)),
    Target(f"{_POOL}.MHATokenToKVPool._init_kv_copy_and_warmup", ("self",)),
    Target(f"{_POOL}.MHATokenToKVPool.get_key_buffer", ("self", "layer_id")),
    Target(f"{_POOL}.MHATokenToKVPool.get_value_buffer", ("self", "layer_id")),
    Target(f"{_POOL}.MHATokenToKVPool.set_kv_buffer"),
    Target("sglang.srt.layers.attention.attention_registry.register_attention_backend", ("name",)),
    Target("sglang.srt.layers.attention.attention_registry.ATTENTION_BACKENDS"),
    Target("sglang.srt.layers.attention.attention_registry.attn_backend_wrapper", ("runner", "full_attn_backend")),
    Target(
        "sglang.srt.arg_groups.model_override_base.get_default_attn_backend",
        ("server_args", "use_mla_backend", "model_config"),
    ),
    Target("sglang.srt.mem_cache.swa_memory_pool.SWAKVPool.get_key_buffer", ("self", "layer_id")),
    Target("sglang.srt.mem_cache.swa_memory_pool.SWAKVPool.get_value_buffer", ("self", "layer_id")),
    Target("sglang.srt.mem_cache.swa_memory_pool.SWAKVPool.get_v_head_dim", ("self",)),
    Target("sglang.srt.speculative.ngram_info.NgramVerifyInput"),
    Target(f"{_BACKEND}.init_forward_metadata", ("self", "forward_batch")),
    Target(f"{_BACKEND}.init_forward_metadata_out_graph", ("self", "forward_batch", "in_capture")),
    Target(f"{_BACKEND}.init_cuda_graph_state", ("self", "max_bs", "max_num_tokens")),
    Target(f"{_BACKEND}.get_cuda_graph_seq_len_fill_value", ("self",)),
    Target(f"{_BACKEND}.forward_decode", _FORWARD),
    Target(f"{_BACKEND}.forward_extend", _FORWARD),
    Target("sglang.srt.layers.radix_attention.RadixAttention"),
    Target("sglang.srt.layers.radix_attention.AttentionType.DECODER"),
    Target(f"{_METRICS}.SchedulerStats.kv_used_tokens"),
    Target(f"{_METRICS}.SchedulerStats.kv_evictable_tokens"),
    Target(f"{_METRICS}.SchedulerMetricsCollector._gauge_cls"),
    Target(f"{_METRICS}.SchedulerMetricsCollector._counter_cls"),
)


def check_release(release: str, targets: Iterable[Target]) -> None:
    """Refuse a release that was not run before and lacks something that SparK needs.

    Raises
    ------
    UnsupportedSGLangError
        Names each target that is missing or has another signature, with both signatures. SGLang logs it and goes on
        without the plugin, so that ``--kv-compress`` does not exist and a server that asks for it does not start.
    """
    if release in RUN_WITH:
        return
    problems = [problem for target in targets if (problem := target.problem()) is not None]
    if problems:
        raise UnsupportedSGLangError(
            f"sglang-spark does not work with SGLang {release}:\n  "
            + "\n  ".join(problems)
            + f"\nReleases it has been run with: {', '.join(RUN_WITH)}"
        )


def warn_of_release(release: str) -> None:
    """Say so where a release was not run before, after all of its targets were found."""
    if release not in RUN_WITH:
        logger.warning(
            f"sglang-spark has not been run with SGLang {release}, only with {', '.join(RUN_WITH)}. Everything it "
            "hooks into is there and takes the expected arguments, so it goes on; scripts/check_versions.py tests a "
            "release."
        )


def _resolve(path: str) -> Any:
    """Like ``pkgutil.resolve_name``, which says 'no attribute' where the import of a module fails."""
    root, *names = path.split(".")
    found = importlib.import_module(root)
    for name in names:
        if isinstance(found, ModuleType) and not hasattr(found, name):
            found = importlib.import_module(f"{found.__name__}.{name}")
        else:
            found = getattr(found, name)
    return found


def _starred(parameter: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return stars.get(parameter.kind, "") + parameter.name
