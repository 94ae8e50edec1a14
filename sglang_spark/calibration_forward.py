"""Measures a calibration: the model reads a short text at start-up, with a backend that only counts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.layers.attention.attention_registry import attn_backend_wrapper
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
    PPProxyTensors,
    enable_num_token_non_padded,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import require_attn_tp_gather, require_mlp_tp_gather

from sglang_spark.calibration import AUTO, STATISTICS, Calibration, Model
from sglang_spark.calibration_text import STRETCHES
from sglang_spark.hybrid import row_layers
from sglang_spark.pool import rows_of
from sglang_spark.server_args import published
from spark_kernels.reference import dense_attention

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

STRETCH_TOKENS = 64
# How `calibrate` asks the server it starts to save what it measured.
OUTPUT_VARIABLE = "SGLANG_SPARK_CALIBRATION_OUTPUT"


class StatisticsBackend(AttentionBackend):
    """Causal attention of sequences to themselves, which needs no pool, and sums of the keys and queries they have.

    Parameters
    ----------
    model_runner
        Its pools are shown to models that look for them; nothing is written.
    """

    def __init__(self, model_runner: ModelRunner):
        super().__init__()
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.lengths: list[int] = []
        self.layers = held_layers(model_runner)
        # Of k, k^2 and q^2 by global layer id, float64 [3, num_kv_heads, head_dim]; of those with rows.
        self.sums: dict[int, torch.Tensor] = {}

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Lengths of the sequences; what is beyond their sum is padding."""
        self.lengths = forward_batch.extend_seq_lens_cpu

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of a request that pads a batch."""
        return 1

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        """The same on a CPU."""
        return 1

    def forward_extend(self, q, k, v, layer: RadixAttention, forward_batch, save_kv_cache=True, sinks=None, **kwargs):
        """Attention of the sequences; q ``[num_tokens, num_qo_heads * head_dim]``, perhaps with padding after."""
        num_tokens, q = sum(self.lengths), q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        padded = len(q)
        k, v = k.view(-1, layer.tp_k_head_num, layer.qk_head_dim), v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
        q, k, v = (x[:num_tokens] for x in (q, k, v))
        if layer.layer_id in self.layers:
            self._count(q, k, layer.layer_id)
        out = v.new_zeros(padded, layer.tp_q_head_num, layer.v_head_dim)
        start = 0
        for length in self.lengths:
            own = slice(start, start := start + length)
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
            if layer.sliding_window_size > -1:
                mask = mask.triu(-layer.sliding_window_size)
            scores = {"sm_scale": layer.scaling, "logits_soft_cap": layer.logit_cap, "sinks": sinks}
            out[own] = dense_attention(q[own], k[own], v[own], mask=mask, **scores)[0]
        return out.flatten(1)

    def _count(self, q: torch.Tensor, k: torch.Tensor, layer_id: int) -> None:
        keys = k.double()
        # The queries of a group count as one each.
        queries = q.double().square().unflatten(1, (k.shape[1], -1)).mean(2)
        sums = torch.stack([x.sum(0) for x in (keys, keys.square(), queries)])
        self.sums[layer_id] = self.sums[layer_id] + sums if layer_id in self.sums else sums


def of_process(model_runner: ModelRunner, tokenizer: Any) -> Calibration:
    """The calibration that ``--spark-calibration`` asks for, of the layers and heads that this process holds."""
    model, source = Model.of(model_runner.model_config), published().spark_calibration
    calibration = collect(model_runner, tokenizer) if source == AUTO else Calibration.load(source, model)
    output = os.environ.get(OUTPUT_VARIABLE)
    if output and torch.distributed.get_rank() == 0:
        calibration.save(output, model, made_from=Path(model_runner.model_config.model_path).name)
    places = [row_layers(model_runner.model_config).index(layer_id) for layer_id in held_layers(model_runner)]
    return calibration.share(places, held_heads(model_runner.model_config))


def collect(model_runner: ModelRunner, tokenizer: Any) -> Calibration:
    """Measure the calibration of a model whose weights are loaded.

    Each of `STRETCHES` is one sequence, at a position of its own between 0 and the context
    length; attention sees the difference of positions only, but keys are rotated by the position itself. All processes
    of a model take part: tensor-parallel ranks hold a part of the heads, pipeline stages a part of the layers and send
    each other hidden states as they do when they serve. LoRA adapters are left out.

    Parameters
    ----------
    model_runner
        Of the target model, with its pools made. Its backend and graphs are not needed.
    tokenizer
        Of the model, or None (``--skip-tokenizer-init``): then the sequences are token ids spread over the vocabulary,
        which say less of the keys of text.

    Returns
    -------
    Calibration
        Of the whole model, the same in every process. A restart gives the same bytes where the model's kernels are
        deterministic.

    Raises
    ------
    RuntimeError
        A layer of the model did not call its attention.
    ValueError
        The statistics are not finite: the weights or the activations are not.
    """
    start = time.perf_counter()
    model_config = model_runner.model_config
    sequences = token_ids(tokenizer, model_config.vocab_size)
    backend = StatisticsBackend(model_runner)
    # Layers that keep a state are SGLang's.
    all_layers = attn_backend_wrapper(model_runner, backend)
    with torch.no_grad(), forward_context(ForwardContext(attn_backend=all_layers)), _ready(model_runner, all_layers):
        for batch in _batches(model_runner, sequences):
            _read(model_runner, batch)
    num_tokens = sum(map(len, sequences))
    calibration = _combined(backend.sums, num_tokens, model_runner)
    logger.info(
        f"SparK calibration: {num_tokens} tokens in {time.perf_counter() - start:.2f} s, "
        f"fingerprint {calibration.fingerprint}"
    )
    return calibration


def token_ids(tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """The stretches as token ids, at most `STRETCH_TOKENS` each, as the tokenizer begins a prompt."""
    if tokenizer is None:
        logger.warning(
            "SparK calibration: without a tokenizer it reads token ids spread over the vocabulary, which say less of "
            "the keys of text; give --spark-calibration a file from python -m sglang_spark.calibrate"
        )
        # By the golden ratio: no id twice, and no neighbours.
        spread = [int(i * 0.6180339887 % 1 * vocab_size) for i in range(len(STRETCHES) * STRETCH_TOKENS)]
        return [spread[i : i + STRETCH_TOKENS] for i in range(0, len(spread), STRETCH_TOKENS)]
    return [tokenizer(stretch)["input_ids"][:STRETCH_TOKENS] for stretch in STRETCHES]


def offsets(sequences: list[list[int]], context_len: int) -> list[int]:
    """Positions at which the sequences begin, spread over the context."""
    room = max(context_len - max(map(len, sequences)), 0)
    return [room * i // (len(sequences) - 1) for i in range(len(sequences))]


@contextmanager
def _ready(model_runner: ModelRunner, backend: AttentionBackend) -> Iterator[None]:
    """Let ``model_runner`` run a batch before it has made the backend and the runners that it makes after its pools."""

    def execute(forward_batch, pp_proxy_tensors=None):
        backend.init_forward_metadata(forward_batch)
        kwargs = model_runner._pp_kwargs(pp_proxy_tensors)
        return model_runner.model.forward(forward_batch.input_ids, forward_batch.positions, forward_batch, **kwargs)

    made_later = {
        "attn_backend": backend,
        "eager_runner": SimpleNamespace(execute=execute),
        "prefill_cuda_graph_runner": None,
        "decode_cuda_graph_runner": None,
    }
    vars(model_runner).update(made_later)
    try:
        yield
    finally:
        for name in made_later:
            delattr(model_runner, name)


def _read(model_runner: ModelRunner, batch: ForwardBatch) -> None:
    """A batch through the layers of this process; its hidden states come from and go to the stages beside it."""
    stages, neighbours = model_runner.pp_group, {"all_gather_group": get_parallel().attn_tp_group}
    received = None if stages.is_first_rank else PPProxyTensors(stages.recv_tensor_dict(**neighbours))
    output = model_runner._forward_raw(batch, received).logits_output
    if not stages.is_last_rank:
        stages.send_tensor_dict(output.tensors, **neighbours)


def _batches(model_runner: ModelRunner, sequences: list[list[int]]) -> Iterator[ForwardBatch]:
    """All sequences together; one by one where layers keep a state, which they leave in SGLang's slot for padding."""
    begins = offsets(sequences, model_runner.model_config.context_len)
    if mambaish_config(model_runner.model_config) is None:
        yield _batch(model_runner, sequences, begins)
        return
    for sequence, begin in zip(sequences, begins, strict=True):
        yield _batch(model_runner, [sequence], [begin])
        slot = torch.zeros(1, dtype=torch.int64, device=model_runner.device)
        model_runner.req_to_token_pool.mamba_pool.clear_slots(slot)


def _batch(model_runner: ModelRunner, sequences: list[list[int]], begins: list[int]) -> ForwardBatch:
    """Prompts without prefixes, whose positions begin there."""
    lengths, device = [len(ids) for ids in sequences], model_runner.device
    num_tokens, batch_size = sum(lengths), len(sequences)

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    positions = tensor([begin + i for begin, length in zip(begins, lengths, strict=True) for i in range(length)])
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        global_forward_mode=ForwardMode.EXTEND,
        is_extend_in_batch=True,
        batch_size=batch_size,
        input_ids=tensor(list(chain.from_iterable(sequences))),
        req_pool_indices=tensor([0] * batch_size),
        # SGLang's slot for padding; nothing is written.
        out_cache_loc=tensor([0] * num_tokens),
        positions=positions,
        mrope_positions=positions.expand(3, -1),
        seq_lens=tensor(lengths),
        seq_lens_cpu=torch.tensor(lengths),
        seq_lens_sum=num_tokens,
        orig_seq_lens=tensor(lengths),
        extend_num_tokens=num_tokens,
        extend_seq_lens=tensor(lengths, torch.int32),
        extend_prefix_lens=tensor([0] * batch_size, torch.int32),
        extend_start_loc=tensor([0, *accumulate(lengths[:-1])], torch.int32),
        extend_seq_lens_cpu=lengths,
        extend_prefix_lens_cpu=[0] * batch_size,
        extend_logprob_start_lens_cpu=lengths,
        global_num_token_non_padded_cpu=num_tokens,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        spec_algorithm=model_runner.spec_algorithm,
        lora_ids=[None] * batch_size if model_runner.lora_manager is not None else None,
    )
    if enable_num_token_non_padded():
        batch.global_num_token_non_padded = torch.tensor(num_tokens, dtype=torch.int32, device=device)
    # Where MLPs gather the tokens of data-parallel attention, every rank reads the same sequences.
    ranks = get_parallel().dp_size if require_mlp_tp_gather() else 1
    if require_mlp_tp_gather() or require_attn_tp_gather():
        batch.original_global_num_tokens_cpu = batch.global_num_tokens_cpu = [num_tokens] * ranks
        batch.global_num_tokens_for_logprob_cpu = [batch_size] * ranks
        batch.global_num_tokens_gpu = tensor([num_tokens] * ranks)
        batch.global_num_tokens_for_logprob_gpu = tensor([batch_size] * ranks)
    if model_runner.lora_manager is not None:
        model_runner.lora_manager.prepare_lora_batch(batch)
    return batch


def held_layers(model_runner: ModelRunner) -> tuple[int, ...]:
    """Global ids of the layers with rows of this process."""
    return rows_of(model_runner.token_to_kv_pool).layout.layers


def held_heads(model_config: Any) -> range:
    """KV heads of this process. With more ranks than heads, several hold the same head and queries of their own."""
    ranks, rank = get_parallel().attn_tp_size, get_parallel().attn_tp_rank
    first = rank * model_config.get_total_num_kv_heads() // ranks
    return range(first, first + model_config.get_num_kv_heads(ranks))


def _combined(sums: dict[int, torch.Tensor], num_tokens: int, model_runner: ModelRunner) -> Calibration:
    """The calibration of the whole model from the sums of all its processes."""
    model = Model.of(model_runner.model_config)
    heads = held_heads(model_runner.model_config)
    _check_all_counted(sums, model_runner)
    # With the heads that SGLang adds to divide them evenly.
    num_heads = model_runner.model_config.get_total_num_kv_heads()
    total = torch.zeros(3, model.num_layers, num_heads, model.head_dim, dtype=torch.float64)
    tokens = torch.zeros(model.num_layers, num_heads, 1, dtype=torch.float64)
    places = {layer_id: place for place, layer_id in enumerate(row_layers(model_runner.model_config))}
    for layer_id, layer_sums in sums.items():
        total[:, places[layer_id], heads.start : heads.stop] = layer_sums.cpu()
        tokens[places[layer_id], heads.start : heads.stop] = num_tokens
    for part in (total, tokens):
        # Zeros leave a sum as it is, and a reduction gives every rank the same bytes.
        torch.distributed.all_reduce(part, group=get_parallel().world_group.cpu_group)
    centre, square, query_square = (total / tokens.clamp(min=1))[:, :, : model.num_kv_heads]
    deviation, query_rms = (square - centre.square()).clamp(min=0).sqrt(), query_square.sqrt()
    for name, statistic in zip(STATISTICS, (centre, deviation, query_rms), strict=True):
        if not statistic.isfinite().all():
            layer = row_layers(model_runner.model_config)[int((~statistic.isfinite()).nonzero()[0, 0])]
            raise ValueError(
                f"--spark-calibration=auto: {name} of layer {layer} is not finite; the model's weights or activations "
                "are not. Serve it with --kv-compress none"
            )
    return Calibration.of(model, centre, deviation, query_rms)


def _check_all_counted(sums: dict[int, torch.Tensor], model_runner: ModelRunner) -> None:
    layers = {module.layer_id for module in model_runner.model.modules() if isinstance(module, RadixAttention)}
    missing = sorted(layers.intersection(held_layers(model_runner)) - sums.keys())
    if missing:
        raise RuntimeError(
            f"--spark-calibration=auto: layers {missing} did not call their attention while the calibration text was "
            "read. Serve this model with --kv-compress none"
        )
