"""SGLang 0.5.10: a backend plans captured batches through methods of their own, which SparK does not have."""

from __future__ import annotations

from sglang_spark.adapters.targets import Target

_BACKEND = "sglang.srt.layers.attention.base_attn_backend.AttentionBackend"
_FORWARD = ("self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache")

TARGETS = (
    Target(f"{_BACKEND}.init_forward_metadata_capture_cuda_graph"),
    Target(f"{_BACKEND}.forward_decode", _FORWARD),
    Target(f"{_BACKEND}.forward_extend", _FORWARD),
    Target("sglang.srt.layers.dp_attention.get_attention_tp_size", ()),
)

# Settings that SparK refuses and this release does not have.
ABSENT_SETTINGS = frozenset({"cuda_graph_config", "kv_canary", "prefill_only_disable_kv_cache"})


def attention_tp_size() -> int:
    """Processes that share the heads of this process's attention layers."""
    from sglang.srt.layers.dp_attention import get_attention_tp_size

    return get_attention_tp_size()


class CaptureContract:
    """What a backend adds for CUDA graphs; goes before ``AttentionBackend`` among the base classes."""

    def init_forward_metadata_capture_cuda_graph(self, *args, **kwargs):
        """Stops the start of a server that captures."""
        raise NotImplementedError(
            "--kv-compress spark runs without CUDA graphs in this release of SGLang; add --disable-cuda-graph"
        )
