"""SGLang's attention backend contract on top of the plan/run wrappers of ``spark_kernels``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType

from sglang_spark.attention.indices import indptr, ragged_slots
from sglang_spark.pool import SparkTokenToKVPool
from spark_kernels.wrappers import SparkBatchDecodeWrapper, SparkBatchPrefillWrapper, write_rows

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


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
        self.pool = model_runner.token_to_kv_pool
        if not isinstance(self.pool, SparkTokenToKVPool):
            raise RuntimeError(
                f"the spark attention backend needs a SparkTokenToKVPool, this server built a "
                f"{type(self.pool).__name__}; start it with --kv-compress spark"
            )
        check_layers(model_runner.model)
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.decode = SparkBatchDecodeWrapper(model_runner.device)
        self.prefill = SparkBatchPrefillWrapper(model_runner.device)
        num_qo_heads = model_runner.model_config.num_attention_heads // model_runner.tp_size
        self.shape = (num_qo_heads, self.pool.layout.num_kv_heads, model_runner.model_config.head_dim)
        # Of the extend batch at hand: where each request's new tokens begin and end, int32 [batch + 1].
        self.qo_indptr: torch.Tensor | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch):
        """Plan the batch, once for all layers."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        if mode.is_decode():
            self.decode.plan(
                *ragged_slots(self.req_to_token, forward_batch.req_pool_indices, forward_batch.seq_lens), *self.shape
            )
            return
        self.qo_indptr = indptr(forward_batch.extend_seq_lens)
        self.prefill.plan(
            self.qo_indptr,
            *ragged_slots(self.req_to_token, forward_batch.req_pool_indices, forward_batch.extend_prefix_lens),
            *self.shape,
        )

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs,
    ) -> torch.Tensor:
        """Attention of one new token per request; q ``[batch, num_qo_heads * head_dim]``."""
        rows = self.pool.layer_rows(layer.layer_id)
        q, k, v = _by_head(layer, q, k, v)
        v_scale = layer.v_scale_float or 1.0
        if save_kv_cache:
            write_rows(q, k, v, forward_batch.out_cache_loc, rows, v_scale=v_scale)
        out = self.decode.run(q, rows, sm_scale=layer.scaling, logits_soft_cap=layer.logit_cap, v_scale=v_scale)
        return out.flatten(1)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs,
    ) -> torch.Tensor:
        """Attention of the new chunks; q ``[total_tokens, num_qo_heads * head_dim]``."""
        rows = self.pool.layer_rows(layer.layer_id)
        q, k, v = _by_head(layer, q, k, v)
        v_scale = layer.v_scale_float or 1.0
        out = self.prefill.run(q, k, v, rows, sm_scale=layer.scaling, logits_soft_cap=layer.logit_cap, v_scale=v_scale)
        if save_kv_cache:
            write_rows(q, k, v, forward_batch.out_cache_loc, rows, qo_indptr=self.qo_indptr, v_scale=v_scale)
        return out.flatten(1)


def check_layers(model: torch.nn.Module) -> None:
    """Refuse layers whose attention is not causal attention over the whole context.

    Raises
    ------
    ValueError
        Names the layer and the property.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    for name, layer in model.named_modules():
        if not isinstance(layer, RadixAttention):
            continue
        for problem, present in (
            ("a sliding window", layer.sliding_window_size > -1),
            ("cross-attention", layer.is_cross_attention),
            (f"attention of type {layer.attn_type}", layer.attn_type != AttentionType.DECODER),
            ("temperature scaling by length", layer.xai_temperature_len > 0),
        ):
            if present:
                raise ValueError(
                    f"--kv-compress spark is not possible with this model: {name} has {problem}. "
                    "Serve it with --kv-compress none"
                )


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
