"""SGLang's attention backend contract on top of the plan/run wrappers of ``spark_kernels``."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import is_cpu

from sglang_spark import metrics
from sglang_spark.attention import drafts
from sglang_spark.attention.indices import fill_slots, indptr
from sglang_spark.pool import SparkTokenToKVPool, rows_of
from spark_kernels import SparkBatchDecodeWrapper, SparkBatchPrefillWrapper, SparkBatchWriteWrapper
from spark_kernels.implementation import runs_triton

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class SparkAttnBackend(AttentionBackend):
    """Attention over compressed rows.

    Decode writes each new token's row and attends to rows only. Extend attends to the new chunk with its exact keys
    and to the cached prefix as restored from rows, and writes the chunk's rows, whose channels are chosen by the
    chunk's last 32 queries. (SparK, arXiv 2508.15212, prunes once after prefill; here every token is pruned when it
    is written, so that its slot can be shared at once.)

    Raises
    ------
    RuntimeError
        The runner's pool is not a SparK pool: this backend must never read dense rows.
    ValueError
        A layer of the model attends in a way that SparK does not serve.
    """

    def __init__(self, model_runner: ModelRunner):
        super().__init__()
        self.pool = rows_of(model_runner.token_to_kv_pool)
        if not isinstance(self.pool, SparkTokenToKVPool):
            raise RuntimeError(
                f"the spark attention backend needs a SparkTokenToKVPool, this server built a "
                f"{type(self.pool).__name__}; start it with --kv-compress spark"
            )
        # What models and SGLang's eager paths ask a backend for.
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        check_layers(model_runner.model, self.pool)
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.device = torch.device(model_runner.device)
        logger.info(f"SparK attention: {'Triton' if runs_triton(self.device) else 'numba'} kernels on {self.device}")
        num_qo_heads = model_runner.model_config.num_attention_heads // get_parallel().attn_tp_size
        self.shape = (num_qo_heads, self.pool.layout.num_kv_heads, model_runner.model_config.head_dim)
        self.eager_decode = SparkBatchDecodeWrapper(self.device)
        # Of captured decode, by the number of tokens; they share the buffers of `init_cuda_graph_state`.
        self.captured_decode: dict[int, SparkBatchDecodeWrapper] = {}
        # Those of the batch at hand.
        self.decode = self.eager_decode
        self.prefill = SparkBatchPrefillWrapper(self.device)
        self.writer = SparkBatchWriteWrapper(self.device)
        self.num_new_tokens = 0

    def init_forward_metadata(self, forward_batch: ForwardBatch):
        """Plan a batch that runs eagerly, once for all layers."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        metrics.count(forward_batch)
        if mode.is_decode() or mode.is_target_verify():
            self._plan_eager_decode(forward_batch)
        else:
            self._plan_extend(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int):
        """Allocate what captured decode reads: room for the longest contexts of the largest batch."""
        self.kv_indptr = torch.zeros(max_num_tokens + 1, dtype=torch.int32, device=self.device)
        most = max_num_tokens * self.req_to_token.shape[1] + 1
        self.kv_indices = torch.zeros(most, dtype=torch.int32, device=self.device)
        self.captured_decode.clear()

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False):
        """Plan a decode batch for a CUDA graph, before its capture or a replay. Nothing is read on the host.

        Requests added to fill a captured batch have length 1 and attend to some slot; their tokens go to slot 0,
        SGLang's for padding.
        """
        num_tokens = forward_batch.batch_size * num_drafts(forward_batch)
        kv_indptr = self.kv_indptr[: num_tokens + 1]
        if num_tokens not in self.captured_decode:
            self.captured_decode[num_tokens] = SparkBatchDecodeWrapper(
                self.device, kv_indptr_buffer=kv_indptr, kv_indices_buffer=self.kv_indices
            )
        self.decode = self.captured_decode[num_tokens]
        self._plan_decode(self.decode, forward_batch, kv_indptr, self.kv_indices)
        if not in_capture:
            metrics.count(forward_batch)
        else:
            # Of the graph: a replay's own slots have been copied there.
            self.writer.plan(forward_batch.out_cache_loc)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of the requests that fill up a captured batch."""
        return 1

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        """Length of the requests that fill up a batch on the CPU."""
        return 1

    def _plan_eager_decode(self, forward_batch: ForwardBatch) -> None:
        total = forward_batch.seq_lens_sum
        if total is None:
            total = forward_batch.batch_size * self.req_to_token.shape[1]
        if forward_batch.forward_mode.is_target_verify():
            total = drafts.room(total, forward_batch.batch_size, num_drafts(forward_batch))
        self.decode = self.eager_decode
        self._plan_decode(self.decode, forward_batch, None, self._empty_slots(total))
        self.writer.plan(forward_batch.out_cache_loc)

    def _plan_decode(
        self,
        wrapper: SparkBatchDecodeWrapper,
        forward_batch: ForwardBatch,
        kv_indptr: torch.Tensor | None,
        kv_indices: torch.Tensor,
    ) -> None:
        lengths = forward_batch.seq_lens
        if forward_batch.forward_mode.is_target_verify():
            mask = forward_batch.spec_info.custom_mask
            tree = drafts.ancestors(mask, lengths, num_drafts(forward_batch), with_prefix=not is_cpu())
            requests = (self.req_to_token, forward_batch.req_pool_indices, lengths)
            kv_indptr = drafts.fill_draft_slots(*requests, tree, kv_indptr, kv_indices)
        else:
            kv_indptr = indptr(lengths, kv_indptr)
            fill_slots(self.req_to_token, forward_batch.req_pool_indices, lengths, kv_indptr, kv_indices)
        wrapper.plan(kv_indptr, kv_indices, *self.shape)

    def _plan_extend(self, forward_batch: ForwardBatch) -> None:
        chunks, prefixes = (
            indptr(torch.tensor(lengths, dtype=torch.int64))
            for lengths in (forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu)
        )
        lengths = forward_batch.extend_prefix_lens
        slots = fill_slots(
            self.req_to_token,
            forward_batch.req_pool_indices,
            lengths,
            indptr(lengths),
            self._empty_slots(int(prefixes[-1])),
        )
        self.prefill.plan(chunks, prefixes, slots, *self.shape)
        self.num_new_tokens = int(chunks[-1])
        self.writer.plan(forward_batch.out_cache_loc[: self.num_new_tokens], indptr(forward_batch.extend_seq_lens))

    def _empty_slots(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int32, device=self.device)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Attention of one new token per request; q ``[batch, num_qo_heads * head_dim]``."""
        _check_known(layer, kwargs)
        rows = self.pool.layer_rows(layer.layer_id)
        q, k, v = _by_head(layer, q, k, v)
        v_scale = value_scale(layer)
        if save_kv_cache:
            self.writer.run(q, k, v, rows, v_scale=v_scale)
        scores = {"sm_scale": layer.scaling, "logits_soft_cap": layer.logit_cap, "sinks": sinks}
        return self.decode.run(q, rows, v_scale=v_scale, **scores).flatten(1)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Attention of the new chunks; q ``[total_tokens, num_qo_heads * head_dim]``, perhaps with padding after.

        Drafts to verify come here too; to this backend they are decodes.
        """
        if forward_batch.forward_mode.is_target_verify():
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, sinks=sinks, **kwargs)
        _check_known(layer, kwargs)
        rows = self.pool.layer_rows(layer.layer_id)
        q, k, v = _by_head(layer, q, k, v)
        padding = q.shape[0] - self.num_new_tokens
        q, k, v = (x[: self.num_new_tokens] for x in (q, k, v))
        v_scale = value_scale(layer)
        scores = {"sm_scale": layer.scaling, "logits_soft_cap": layer.logit_cap, "sinks": sinks}
        out = self.prefill.run(q, k, v, rows, v_scale=v_scale, **scores)
        if save_kv_cache:
            self.writer.run(q, k, v, rows, v_scale=v_scale)
        return torch.nn.functional.pad(out.flatten(1), (0, 0, 0, padding)) if padding else out.flatten(1)


def num_drafts(forward_batch: ForwardBatch) -> int:
    """Tokens per request of a decode batch: one, or those to verify."""
    return forward_batch.spec_info.draft_token_num if forward_batch.forward_mode.is_target_verify() else 1


def check_layers(model: torch.nn.Module, pool: SparkTokenToKVPool) -> None:
    """Refuse layers with rows whose attention is not causal attention over the whole context.

    Raises
    ------
    ValueError
        Names the layer and the property.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    for name, layer in model.named_modules():
        if not isinstance(layer, RadixAttention):
            continue
        if pool.place(layer.layer_id) is None:
            # Its pool drops what is out of the window; a layer of Llama 4 attends to chunks of that size.
            if layer.sliding_window_size <= -1 and not layer.use_irope:
                raise ValueError(
                    f"--kv-compress spark is not possible with this model: {name} attends to the whole context and has "
                    "no rows. Serve it with --kv-compress none"
                )
            continue
        for problem, present in (
            ("a sliding window", layer.sliding_window_size > -1),
            ("cross-attention", layer.is_cross_attention),
            (f"attention of type {layer.attn_type}", layer.attn_type != AttentionType.DECODER),
            ("temperature scaling by length", layer.xai_temperature_len > 0),
            (f"positions encoded as {layer.pos_encoding_mode}", layer.pos_encoding_mode != "NONE"),
            (f"a soft cap by {layer.logit_capping_method}", layer.logit_cap and layer.logit_capping_method != "tanh"),
        ):
            if present:
                raise ValueError(
                    f"--kv-compress spark is not possible with this model: {name} has {problem}. "
                    "Serve it with --kv-compress none"
                )


def _check_known(layer: RadixAttention, extras: dict[str, object]) -> None:
    """Refuse what a model hands its attention besides q, k, v and sinks.

    Raises
    ------
    NotImplementedError
        Names the layer and the arguments.
    """
    asked = [name for name, value in extras.items() if value is not None]
    if asked:
        raise NotImplementedError(
            f"layer {layer.layer_id} asks for attention with {', '.join(asked)}, which --kv-compress spark does not "
            "serve. Serve this model with --kv-compress none"
        )


def value_scale(layer: RadixAttention) -> float:
    """What the layer's values are divided by when stored; a checkpoint's, or of ``--quantization-param-path``."""
    if layer.v_scale_float is not None:
        return layer.v_scale_float
    # The file's scales are floats in the place of the checkpoint's tensors.
    return layer.v_scale if isinstance(layer.v_scale, float) else 1.0


def _by_head(layer: RadixAttention, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None):
    if k is None or v is None:
        raise NotImplementedError(
            f"layer {layer.layer_id} reuses another layer's cache, which --kv-compress spark does not serve"
        )
    return (
        q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
        k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
        v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
    )
