"""Models with window layers: those stay SGLang's, with a dense pool and a backend of its own; the others have rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sglang_spark.attention.backend import SparkAttnBackend
from sglang_spark.server_args import published

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class WindowedSparkAttnBackend(SparkAttnBackend):
    """Attention of a model with window layers: over rows where a layer has them, else by a backend of SGLang's.

    ``--spark-window-backend`` names it. It plans every batch beside this one.
    """

    def __init__(self, model_runner: ModelRunner):
        super().__init__(model_runner)
        name = resolved_view(published()).spark_window_backend
        self.windows = ATTENTION_BACKENDS[name](WindowsOfRunner(model_runner))
        self.extend_dummy_seqs_capped_by_req_pool = self.windows.extend_dummy_seqs_capped_by_req_pool

    def init_forward_metadata(self, forward_batch: ForwardBatch):
        super().init_forward_metadata(forward_batch)
        self.windows.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self.windows.init_cuda_graph_state(max_bs, max_num_tokens)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False):
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        self.windows.init_forward_metadata_out_graph(forward_batch, in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch):
        self.windows.init_forward_metadata_in_graph(forward_batch)

    def on_after_cuda_graph_warmup(self):
        self.windows.on_after_cuda_graph_warmup()

    def shared_read_ends(self, fm: Any) -> SharedReadEnds:
        return SharedReadEnds.max_of((super().shared_read_ends(fm), self.windows.shared_read_ends(fm)))

    def forward_decode(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **extras):
        served_by = self.windows if self.pool.place(layer.layer_id) is None else super()
        return served_by.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **extras)

    def forward_extend(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, **extras):
        served_by = self.windows if self.pool.place(layer.layer_id) is None else super()
        return served_by.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **extras)


class WindowsOfRunner:
    """A ``ModelRunner`` as the backend of the window layers sees it: its pool is `WindowsOfPool`."""

    def __init__(self, model_runner: ModelRunner):
        self._model_runner = model_runner
        self.token_to_kv_pool = WindowsOfPool(model_runner.token_to_kv_pool)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model_runner, name)


class WindowsOfPool(SWAKVPool):
    """The pools of a hybrid model, whose layers with rows look like dense ones without tokens.

    Backends ask for the shape of some layer's buffer; a row's length is not the head_dim that they look for.

    Parameters
    ----------
    pool
        Shares all its state with this one.
    """

    def __init__(self, pool: SWAKVPool):
        self.__dict__ = pool.__dict__

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return super().get_key_buffer(layer_id) if self._is_window(layer_id) else self._no_tokens()

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return super().get_value_buffer(layer_id) if self._is_window(layer_id) else self._no_tokens()

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.get_key_buffer(layer_id), self.get_value_buffer(layer_id)

    def get_v_head_dim(self) -> int:
        return self.swa_kv_pool.v_head_dim

    def _is_window(self, layer_id: int) -> bool:
        return self.layers_mapping[layer_id][1]

    def _no_tokens(self) -> torch.Tensor:
        return self.swa_kv_pool.get_value_buffer(0)[:0]
