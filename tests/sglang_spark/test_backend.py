"""SGLang's contract with an attention backend, on batches made by hand: over numba's kernels, and over Triton's."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from row_pools import make_pool
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_spark.attention.backend import SparkAttnBackend, check_layers
from spark_kernels import LayerRows, Numbers, Pruned, reference
from spark_kernels.implementation import runs_triton

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, MAX_CONTEXT = 4, 2, 64, 80
SM_SCALE = HEAD_DIM**-0.5
INTERPRETED = runs_triton(torch.device("cpu"))
# Of attention over rows: the Triton kernels round queries to float16.
TOLERANCE = 1e-3 if INTERPRETED else 1e-5

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def backend(monkeypatch) -> SparkAttnBackend:
    monkeypatch.setattr("sglang_spark.attention.backend.get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    values = Numbers(HEAD_DIM, torch.float16)
    pool = make_pool(400, (Pruned.from_ratio(HEAD_DIM, 0.7, 3),), values, num_kv_heads=NUM_KV_HEADS)
    slots = 1 + torch.randperm(400)[: 5 * MAX_CONTEXT].view(5, MAX_CONTEXT)
    runner = SimpleNamespace(
        token_to_kv_pool=pool,
        model=torch.nn.Module(),
        req_to_token_pool=SimpleNamespace(req_to_token=slots.int()),
        device="cpu",
        model_config=SimpleNamespace(num_attention_heads=NUM_QO_HEADS, head_dim=HEAD_DIM),
    )
    return SparkAttnBackend(runner)


@pytest.fixture
def layer() -> RadixAttention:
    return RadixAttention(NUM_QO_HEADS, HEAD_DIM, SM_SCALE, NUM_KV_HEADS, layer_id=0)


def _tokens(count: int) -> list[torch.Tensor]:
    """q, k, v as a model gives them: heads side by side."""
    return [torch.randn(count, heads * HEAD_DIM) for heads in (NUM_QO_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]


def _by_head(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.view(len(tensor), -1, HEAD_DIM) for tensor in tensors]


def _extend_batch(backend, requests, prefixes, chunks, mode=ForwardMode.EXTEND) -> SimpleNamespace:
    new = [backend.req_to_token[r, p : p + c] for r, p, c in zip(requests, prefixes, chunks, strict=True)]
    return SimpleNamespace(
        forward_mode=mode,
        batch_size=len(requests),
        req_pool_indices=torch.tensor(requests),
        extend_seq_lens=torch.tensor(chunks, dtype=torch.int32),
        extend_prefix_lens=torch.tensor(prefixes, dtype=torch.int32),
        extend_seq_lens_cpu=list(chunks),
        extend_prefix_lens_cpu=list(prefixes),
        out_cache_loc=torch.cat(new).long(),
    )


def _decode_batch(backend, requests, lengths) -> SimpleNamespace:
    """A batch whose requests have ``lengths`` tokens, the new one included."""
    last = [int(backend.req_to_token[r, n - 1]) for r, n in zip(requests, lengths, strict=True)]
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(requests),
        req_pool_indices=torch.tensor(requests),
        seq_lens=torch.tensor(lengths),
        seq_lens_sum=sum(lengths),
        out_cache_loc=torch.tensor(last),
    )


def _indptr(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _slots(backend, requests, lengths) -> torch.Tensor:
    return torch.cat([backend.req_to_token[r, :n] for r, n in zip(requests, lengths, strict=True)]).long()


def _copy(rows: LayerRows) -> LayerRows:
    return replace(rows, keys=rows.keys.clone(), values=rows.values.clone())


def _assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected.flatten(1)).norm() <= TOLERANCE * expected.norm()


def _prefill(backend, layer, requests, lengths) -> None:
    """Give the requests contexts of these lengths."""
    batch = _extend_batch(backend, requests, [0] * len(requests), lengths)
    backend.init_forward_metadata(batch)
    backend.forward_extend(*_tokens(sum(lengths)), layer, batch)


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.MIXED], ids=lambda mode: mode.name)
def test_extend_attends_and_writes(mode, backend, layer):
    requests, prefixes, chunks = (3, 0, 2), (20, 0, 33), (7, 9, 1)
    _prefill(backend, layer, (3, 2), (20, 33))
    batch = _extend_batch(backend, requests, prefixes, chunks, mode)
    tokens = _tokens(sum(chunks))
    rows = backend.pool.layer_rows(0)
    expected = reference.extend_attention(
        *_by_head(*tokens),
        rows,
        _indptr(chunks),
        _indptr(prefixes),
        _slots(backend, requests, prefixes),
        sm_scale=SM_SCALE,
    )[0]
    expected_rows = _copy(rows)
    reference.write_rows(*_by_head(*tokens), batch.out_cache_loc, expected_rows, qo_indptr=_indptr(chunks))
    backend.init_forward_metadata(batch)
    _assert_close(backend.forward_extend(*tokens, layer, batch), expected)
    assert torch.equal(rows.keys, expected_rows.keys) and torch.equal(rows.values, expected_rows.values)


def test_padding_after_the_new_tokens_is_ignored(backend, layer):
    batch = _extend_batch(backend, (1, 4), (0, 0), (5, 6))
    tokens = _tokens(16)
    padded = torch.cat([batch.out_cache_loc, torch.zeros(5, dtype=torch.int64)])
    backend.init_forward_metadata(batch)
    expected = backend.forward_extend(*(x[:11] for x in tokens), layer, batch)
    rows = _copy(backend.pool.layer_rows(0))
    batch.out_cache_loc = padded
    backend.init_forward_metadata(batch)
    out = backend.forward_extend(*tokens, layer, batch)
    assert torch.equal(out[:11], expected) and not out[11:].any()
    assert torch.equal(backend.pool.layer_rows(0).keys, rows.keys)


def _decode(backend, layer, batch, tokens) -> torch.Tensor:
    """What decode of the batch should say, from the reference; the tokens are stored."""
    rows = backend.pool.layer_rows(0)
    expected_rows = _copy(rows)
    q, k, v = _by_head(*tokens)
    reference.write_rows(q, k, v, batch.out_cache_loc, expected_rows)
    requests, lengths = batch.req_pool_indices.tolist(), batch.seq_lens.tolist()
    slots = _slots(backend, requests, lengths)
    return reference.decode_attention(q, expected_rows, _indptr(lengths), slots, sm_scale=SM_SCALE)[0]


@pytest.mark.parametrize("total", ["known", "unknown"])
def test_decode_writes_and_attends(total, backend, layer):
    _prefill(backend, layer, (0, 4, 1), (11, 40, 1))
    batch = _decode_batch(backend, (4, 0, 1), (41, 12, 2))
    if total == "unknown":
        batch.seq_lens_sum = None
    tokens = _tokens(3)
    expected = _decode(backend, layer, batch, tokens)
    backend.init_forward_metadata(batch)
    _assert_close(backend.forward_decode(*tokens, layer, batch), expected)


def _verify_batch(backend, requests, prefixes, trees) -> SimpleNamespace:
    """Drafts after these prefixes; a tree says of each whom it attends to."""
    width = len(trees[0])
    new = [backend.req_to_token[r, p : p + width] for r, p in zip(requests, prefixes, strict=True)]
    mask = [
        torch.cat([torch.ones(width, prefix), torch.tensor(tree)], dim=1).bool().flatten()
        for prefix, tree in zip(prefixes, trees, strict=True)
    ]
    return SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        batch_size=len(requests),
        req_pool_indices=torch.tensor(requests),
        seq_lens=torch.tensor(prefixes),
        seq_lens_sum=sum(prefixes),
        out_cache_loc=torch.cat(new).long(),
        spec_info=SimpleNamespace(draft_token_num=width, custom_mask=torch.cat(mask)),
    )


TREES = ([[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 0, 1]])


def test_a_verified_draft_is_a_decode_after_those_that_lead_to_it(backend, layer):
    requests, prefixes = (4, 0), (40, 11)
    _prefill(backend, layer, requests, prefixes)
    batch = _verify_batch(backend, requests, prefixes, TREES)
    tokens = _tokens(6)
    rows = backend.pool.layer_rows(0)
    expected_rows = _copy(rows)
    q, k, v = _by_head(*tokens)
    reference.write_rows(q, k, v, batch.out_cache_loc, expected_rows)
    backend.init_forward_metadata(batch)
    out = backend.forward_extend(*tokens, layer, batch)
    assert torch.equal(rows.keys, expected_rows.keys)
    for node in range(6):
        request, drafts = requests[node // 3], batch.out_cache_loc.view(2, 3)[node // 3]
        attends = torch.tensor(TREES[node // 3][node % 3]).bool()
        slots = torch.cat([_slots(backend, (request,), (prefixes[node // 3],)), drafts[attends]])
        expected = reference.decode_attention(
            q[node : node + 1], expected_rows, _indptr((len(slots),)), slots, sm_scale=SM_SCALE
        )[0]
        _assert_close(out[node : node + 1], expected)


def test_values_are_stored_by_the_scale_of_the_layer(backend, layer):
    """``--quantization-param-path`` sets ``v_scale`` alone, a checkpoint also ``v_scale_float``."""
    batch = _extend_batch(backend, (1,), (0,), (5,))
    q, k, v = _tokens(5)
    layer.v_scale = 0.25
    backend.init_forward_metadata(batch)
    backend.forward_extend(q, k, v, layer, batch)
    by_file = _copy(backend.pool.layer_rows(0))
    expected = _copy(by_file)
    reference.write_rows(*_by_head(q, k, v), batch.out_cache_loc, expected, qo_indptr=_indptr((5,)), v_scale=0.25)
    layer.v_scale, layer.v_scale_float = torch.tensor(0.25), 0.25
    backend.forward_extend(q, k, v, layer, batch)
    assert torch.equal(by_file.values, expected.values)
    assert torch.equal(backend.pool.layer_rows(0).values, expected.values)


def test_more_than_plain_attention_is_refused(backend, layer):
    batch = _extend_batch(backend, (1,), (0,), (5,))
    tokens = _tokens(5)
    backend.init_forward_metadata(batch)
    backend.forward_extend(*tokens, layer, batch, k_rope=None)
    with pytest.raises(NotImplementedError, match="layer 0 asks for attention with k_rope, which"):
        backend.forward_extend(*tokens, layer, batch, k_rope=torch.zeros(5))
    decode = _decode_batch(backend, (1,), (6,))
    backend.init_forward_metadata(decode)
    with pytest.raises(NotImplementedError, match="layer 0 asks for attention with k_rope, which"):
        backend.forward_decode(*_tokens(1), layer, decode, k_rope=torch.zeros(1))


@pytest.mark.parametrize(
    ("properties", "problem"),
    [
        ({"sliding_window_size": 128}, "a sliding window"),
        ({"is_cross_attention": True}, "cross-attention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention of type"),
        ({"pos_encoding_mode": "ALIBI"}, "positions encoded as ALIBI"),
        ({"logit_cap": 30.0, "logit_capping_method": "softsign"}, "a soft cap by softsign"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_attend_otherwise_are_refused(backend, properties, problem):
    model = torch.nn.Module()
    model.attention = RadixAttention(NUM_QO_HEADS, HEAD_DIM, SM_SCALE, NUM_KV_HEADS, layer_id=0, **properties)
    with pytest.raises(ValueError, match=f"not possible with this model: attention has {problem}"):
        check_layers(model, backend.pool)


def test_an_idle_batch_needs_no_plan(backend):
    backend.init_forward_metadata(SimpleNamespace(forward_mode=ForwardMode.IDLE))


@pytest.mark.skipif(not INTERPRETED, reason="no CUDA graphs over numba's kernels")
def test_captured_decode_follows_its_buffers(backend, layer):
    """As SGLang's runner: capture on dummies, then replays that fill the buffers and plan; no new Python objects."""
    _prefill(backend, layer, (0, 4, 1), (11, 40, 1))
    fill = backend.get_cuda_graph_seq_len_fill_value()
    backend.init_cuda_graph_state(4, 4)
    for batch_size in (4, 2):
        static = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=batch_size,
            req_pool_indices=torch.zeros(batch_size, dtype=torch.int64),
            seq_lens=torch.full((batch_size,), fill),
            seq_lens_sum=fill * batch_size,
            out_cache_loc=torch.zeros(batch_size, dtype=torch.int64),
        )
        static_tokens = _tokens(batch_size)
        backend.init_forward_metadata_out_graph(static, in_capture=True)
        backend.init_forward_metadata_in_graph(static)
        captured, writer = backend.decode, backend.writer
        for requests, lengths in (((4, 0, 1), (41, 12, 2)), ((1,), (3,)), ((0, 1), (13, 4))):
            if len(requests) > batch_size:
                continue
            batch = _decode_batch(backend, requests, lengths)
            tokens = _tokens(len(requests))
            expected = _decode(backend, layer, batch, tokens)
            for field, padding in (("req_pool_indices", 0), ("seq_lens", fill), ("out_cache_loc", 0)):
                static_field = getattr(static, field).fill_(padding)
                static_field[: len(requests)] = getattr(batch, field)
            for static_token, token in zip(static_tokens, tokens, strict=True):
                static_token[: len(requests)] = token
            # The view that SGLang plans a replay with has the batch's own slots, without padding.
            view = SimpleNamespace(**vars(static) | {"out_cache_loc": batch.out_cache_loc})
            backend.init_forward_metadata_out_graph(view)
            assert backend.decode is captured
            out = backend.forward_decode(*static_tokens, layer, static)
            _assert_close(out[: len(requests)], expected)
            assert out.isfinite().all()
        assert writer is backend.writer


@pytest.mark.skipif(not INTERPRETED, reason="no CUDA graphs over numba's kernels")
def test_captured_verification_follows_its_buffers(backend, layer):
    _prefill(backend, layer, (4, 0), (40, 11))
    backend.init_cuda_graph_state(2, 6)
    static = _verify_batch(backend, (0, 0), (1, 1), (TREES[0], TREES[0]))
    backend.init_forward_metadata_out_graph(static, in_capture=True)
    captured = backend.decode
    batch = _verify_batch(backend, (4, 0), (40, 11), TREES)
    tokens = _tokens(6)
    backend.init_forward_metadata(batch)
    expected = backend.forward_extend(*tokens, layer, batch)
    backend.init_forward_metadata_out_graph(batch)
    assert backend.decode is captured
    torch.testing.assert_close(backend.forward_extend(*tokens, layer, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="this is what runs it")
def test_all_of_this_over_triton_kernels():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
