"""A model of window layers and others: each is served from its own pool, by its own backend."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from row_pools import make_pool, pruned
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_spark import canary, hooks
from sglang_spark.attention import windows
from sglang_spark.attention.windows import WindowedSparkAttnBackend, WindowsOfPool
from spark_kernels import reference

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, WINDOW = 4, 2, 64, 7
SM_SCALE = HEAD_DIM**-0.5
ROWS, WINDOW_LAYERS = [1, 3], [0, 2]
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.fixture
def runner(monkeypatch):
    """Of a model whose layers with rows are 1 and 3; slots of windows are others than those of rows."""
    monkeypatch.setattr("sglang_spark.attention.backend.get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    monkeypatch.setattr(windows, "resolved_view", lambda _: SimpleNamespace(spark_window_backend="torch_native"))
    monkeypatch.setattr(windows, "published", lambda: None)

    def rows(size, **kwargs):
        assert kwargs.pop("allocation_label") == "Full"
        return make_pool(size, (pruned(HEAD_DIM),) * 2, num_kv_heads=NUM_KV_HEADS, layers=ROWS)

    pool = SWAKVPool(
        size=256,
        size_swa=64,
        page_size=1,
        dtype=torch.float32,
        head_num=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        swa_attention_layer_ids=WINDOW_LAYERS,
        full_attention_layer_ids=ROWS,
        device="cpu",
        full_kv_pool_class=rows,
        swa_kv_pool_class=MHATokenToKVPool,
    )
    mapping = torch.zeros(258, dtype=torch.int64)
    mapping[1:61] = torch.arange(60, 0, -1)
    pool.register_mapping(mapping)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(_layer(layer_id) for layer_id in range(4))
    return SimpleNamespace(
        token_to_kv_pool=pool,
        model=model,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.randperm(60)[None].int() + 1),
        device="cpu",
        model_config=SimpleNamespace(num_attention_heads=NUM_QO_HEADS, head_dim=HEAD_DIM),
    )


def _layer(layer_id: int) -> RadixAttention:
    window = WINDOW if layer_id in WINDOW_LAYERS else -1
    return RadixAttention(NUM_QO_HEADS, HEAD_DIM, SM_SCALE, NUM_KV_HEADS, layer_id, sliding_window_size=window)


def _batch(runner, mode: ForwardMode, prefix: int, chunk: int) -> SimpleNamespace:
    return SimpleNamespace(
        forward_mode=mode,
        batch_size=1,
        req_pool_indices=torch.tensor([0]),
        extend_seq_lens=torch.tensor([chunk], dtype=torch.int32),
        extend_prefix_lens=torch.tensor([prefix], dtype=torch.int32),
        extend_seq_lens_cpu=[chunk],
        extend_prefix_lens_cpu=[prefix],
        seq_lens=torch.tensor([prefix + chunk]),
        seq_lens_sum=prefix + chunk,
        encoder_lens=None,
        out_cache_loc=runner.req_to_token_pool.req_to_token[0, prefix : prefix + chunk].long(),
    )


def _run(backend, runner, layer_id: int, q, k, v) -> torch.Tensor:
    """The tokens in two chunks, the last by decode; the layer with rows has sinks."""
    layer, outputs = runner.model.layers[layer_id], []
    extras = {"sinks": SINKS} if layer_id in ROWS else {}
    for first, last in ((0, 20), (20, 33), (33, 34)):
        mode = ForwardMode.DECODE if last - first == 1 else ForwardMode.EXTEND
        batch = _batch(runner, mode, first, last - first)
        backend.init_forward_metadata(batch)
        forward = backend.forward_decode if mode.is_decode() else backend.forward_extend
        # As ``RadixAttention`` hands them on.
        outputs.append(forward(q[first:last].flatten(1), k[first:last], v[first:last], layer, batch, **extras))
    return torch.cat(outputs).view(34, NUM_QO_HEADS, HEAD_DIM)


@pytest.fixture
def tokens():
    return [torch.randn(34, heads, HEAD_DIM) for heads in (NUM_QO_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]


@pytest.mark.parametrize("layer_id", WINDOW_LAYERS)
def test_window_layers_are_dense_and_see_their_window(layer_id, runner, tokens):
    out = _run(WindowedSparkAttnBackend(runner), runner, layer_id, *tokens)
    mask = torch.ones(34, 34, dtype=torch.bool).tril().triu(-WINDOW)
    expected = reference.dense_attention(*tokens, sm_scale=SM_SCALE, mask=mask)[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer_id", ROWS)
def test_the_others_have_rows_and_sinks(layer_id, runner, tokens):
    backend = WindowedSparkAttnBackend(runner)
    out = _run(backend, runner, layer_id, *tokens)
    rows, slots = backend.pool.layer_rows(layer_id), runner.req_to_token_pool.req_to_token[0].long()
    first = torch.ones(20, 20, dtype=torch.bool).tril()
    q, k, v = tokens
    scores = {"sm_scale": SM_SCALE, "sinks": SINKS}
    expected = reference.dense_attention(q[:20], k[:20], v[:20], mask=first, **scores)[0]
    torch.testing.assert_close(out[:20], expected, atol=1e-4, rtol=1e-4)
    expected = reference.decode_attention(q[33:], rows, torch.tensor([0, 34]), slots, **scores)[0]
    torch.testing.assert_close(out[33:], expected, atol=1e-4, rtol=1e-4)


def test_only_layers_with_rows_are_watched(runner, tokens):
    backend = canary.watched(WindowedSparkAttnBackend)(runner)
    for layer_id in range(4):
        _run(backend, runner, layer_id, *tokens)
    backend.pool.k_buffer[1][backend._read[3], 0, 5] += 1
    batch = _batch(runner, ForwardMode.DECODE, 33, 1)
    q, k, v = (x[33:] for x in tokens)
    for layer_id in (0, 1, 2):
        backend.forward_decode(q.flatten(1), k, v, runner.model.layers[layer_id], batch)
    with pytest.raises(canary.RowChanged, match="layer 3 reads rows that changed"):
        backend.forward_decode(q.flatten(1), k, v, runner.model.layers[3], batch)


def test_a_layer_with_rows_must_not_have_a_window(runner):
    runner.model.layers[1].sliding_window_size = WINDOW
    with pytest.raises(ValueError, match=r"layers\.1 has a sliding window"):
        WindowedSparkAttnBackend(runner)


def test_a_window_layer_must_have_a_window(runner):
    """Else it would read tokens that have left its pool."""
    runner.model.layers[2].sliding_window_size = -1
    with pytest.raises(ValueError, match=r"layers\.2 attends to the whole context"):
        WindowedSparkAttnBackend(runner)


def test_layers_with_rows_have_the_shape_of_dense_ones(runner):
    shown = WindowsOfPool(runner.token_to_kv_pool)
    assert shown.get_value_buffer(1).shape == (0, NUM_KV_HEADS, HEAD_DIM)
    assert shown.get_v_head_dim() == HEAD_DIM
    assert shown.get_key_buffer(2) is runner.token_to_kv_pool.get_key_buffer(2)
    shown.register_mapping(mapping := torch.zeros(3))
    assert runner.token_to_kv_pool.full_to_swa_index_mapping is mapping


def test_the_pool_of_windows_is_sglangs():
    def dense(size, **kwargs):
        return size, kwargs

    assert hooks._pool(None, dense, 64, size=64, allocation_label="SWA", dtype=torch.float16) == (
        64,
        {"allocation_label": "SWA", "dtype": torch.float16},
    )
