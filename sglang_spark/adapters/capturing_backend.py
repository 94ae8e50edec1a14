"""SGLang 0.5.14 on: a backend plans captured and eager batches through one method, and topology is in one place."""

from __future__ import annotations

from sglang_spark.adapters.targets import Target

_BACKEND = "sglang.srt.layers.attention.base_attn_backend.AttentionBackend"
_FORWARD = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "**kwargs")

TARGETS = (
    Target(f"{_BACKEND}.init_forward_metadata_out_graph", ("self", "forward_batch", "in_capture")),
    Target(f"{_BACKEND}.forward_decode", _FORWARD),
    Target(f"{_BACKEND}.forward_extend", _FORWARD),
    Target("sglang.srt.runtime_context.get_parallel", ()),
)

# Settings that SparK refuses and these releases do not have.
ABSENT_SETTINGS: frozenset[str] = frozenset()


def attention_tp_size() -> int:
    """Processes that share the heads of this process's attention layers."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().attn_tp_size


class CaptureContract:
    """What a backend adds for CUDA graphs; goes before ``AttentionBackend`` among the base classes. Nothing here."""
