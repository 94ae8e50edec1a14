"""Rows in SGLang's pool: sizes, capacity, and that slots are moved and copied whole."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from model_configs import write_model
from row_pools import make_pool, pruned
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator
from sglang.srt.runtime_context import publish
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_spark.hooks import share_of
from sglang_spark.layout import PoolLayout
from sglang_spark.pool import SparkTokenToKVPool
from sglang_spark.server_args import record_of_keywords
from spark_kernels import Numbers

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 128
DENSE_BYTES = NUM_LAYERS * NUM_KV_HEADS * 2 * HEAD_DIM * 2


@pytest.fixture(scope="module")
def configurator(tmp_path_factory):
    """What SGLang sizes a pool from, for the small Llama in bfloat16."""
    folder = write_model(tmp_path_factory.mktemp("model"), "llama")
    return SimpleNamespace(
        model_config=ModelConfig(str(folder)),
        layer_info=SimpleNamespace(start_layer=0, end_layer=NUM_LAYERS, num_effective_layers=NUM_LAYERS),
        kv_cache_dtype=torch.bfloat16,
        kv_cache_dtype_str="auto",
        model_dtype=torch.bfloat16,
        use_mla_backend=False,
        is_draft_worker=False,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        pp_size=1,
    )


def _publish(configurator, **settings):
    arguments = record_of_keywords(model_path=configurator.model_config.model_path, **settings)
    publish(arguments, role="scheduler")
    return arguments


def _tokens_in(budget: int, configurator, *, kv_cache_dtype: str = "auto", **settings) -> int:
    arguments = _publish(configurator, **settings)
    value_dtype = torch.float8_e4m3fn if kv_cache_dtype == "fp8_e4m3" else torch.bfloat16
    configurator = SimpleNamespace(
        **{
            **vars(configurator),
            "kv_cache_dtype": value_dtype,
            "kv_cache_dtype_str": kv_cache_dtype,
            "server_args": arguments,
        }
    )
    return DefaultPoolConfigurator(configurator).calculate_pool_sizes(budget, 1).max_total_num_tokens


@pytest.mark.parametrize(
    ("settings", "bytes_per_token"),
    [
        ({}, 4 * 2 * (64 + 72)),
        ({"spark_value_dtype": "auto"}, 4 * 2 * (64 + 256)),
        ({"spark_value_dtype": "auto", "kv_cache_dtype": "fp8_e4m3"}, 4 * 2 * (64 + 128)),
        ({"spark_value_dtype": "int3"}, 4 * 2 * (64 + 56)),
        ({"spark_key_ratio": 0.0, "spark_value_dtype": "auto"}, 4 * 2 * (256 + 256)),
        ({"spark_key_ratio": 0.0}, 4 * 2 * (256 + 72)),
        ({"spark_restore_bits": 2}, 4 * 2 * (48 + 72)),
        ({"spark_dense_layers": "0,3"}, 2 * 2 * (64 + 72) + 2 * 2 * (256 + 72)),
    ],
    ids=[
        "default",
        "auto-values",
        "fp8-values",
        "int3-values",
        "lossless",
        "ratio-0-int4-values",
        "2-bits",
        "two-dense-layers",
    ],
)
def test_capacity_grows_by_the_ratio_of_bytes_per_token(settings, bytes_per_token, configurator):
    budget = 64 << 20
    assert _tokens_in(budget, configurator) == budget // DENSE_BYTES
    assert _tokens_in(budget, configurator, kv_compress="spark", **settings) == budget // bytes_per_token


@pytest.mark.parametrize(("value_dtype", "values"), [("auto", "bfloat16"), ("int4", "int4")])
def test_layout_follows_the_published_settings(value_dtype, values, configurator):
    _publish(configurator, kv_compress="spark", spark_value_dtype=value_dtype, spark_dense_layers="1")
    layout = PoolLayout.of(share_of(configurator), "auto", 1)
    assert [key_format.row_bytes for key_format in layout.key_formats] == [64, 256, 64, 64]
    assert layout.dense_bytes_per_token == DENSE_BYTES
    line = layout.summary(1000)
    assert f"{layout.bytes_per_token} bytes per token against {DENSE_BYTES} dense" in line
    assert (
        f"6 of 128 key channels kept and the others restored from 3 bits in 3 of 4 layers, {values} values, 1000 tokens"
        in line
    )
    assert f"1000 tokens against {1000 * layout.bytes_per_token // DENSE_BYTES} dense" in line


@pytest.fixture
def pool(request):
    """A pool of 64 slots whose second layer keeps whole keys, filled with random bytes."""
    key_formats = (pruned(HEAD_DIM), Numbers(HEAD_DIM, torch.bfloat16), pruned(HEAD_DIM))
    page_size = getattr(request, "param", 1)
    pool = make_pool(64, key_formats, num_kv_heads=NUM_KV_HEADS, page_size=page_size, start_layer=5)
    for buffer in pool.k_buffer + pool.v_buffer:
        buffer.random_(0, 256)
    return pool


def _everything(pool: SparkTokenToKVPool) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in pool.k_buffer + pool.v_buffer]


def test_rows_of_a_layer_by_its_global_id(pool):
    assert [pool.layer_rows(layer).key_format.row_bytes for layer in (5, 6, 7)] == [80, 256, 80]
    assert pool.layer_rows(6).keys.data_ptr() == pool.k_buffer[1].data_ptr()


def test_reported_size_is_slots_times_bytes_per_token(pool):
    assert sum(pool.get_kv_size_bytes()) == (64 + 1) * pool.layout.bytes_per_token


@pytest.mark.parametrize("pool", [1, 16], indirect=True, ids=lambda page_size: f"page_size={page_size}")
def test_transfer_descriptors_cover_the_buffers_page_by_page(pool):
    pointers, lengths, item_lengths = pool.get_contiguous_buf_infos()
    buffers = pool.k_buffer + pool.v_buffer
    assert pointers == [buffer.data_ptr() for buffer in buffers]
    assert lengths == [buffer.nbytes for buffer in buffers]
    assert item_lengths == [buffer[0].nbytes * pool.page_size for buffer in buffers]


def test_slots_come_back_from_a_cpu_copy_as_they_were(pool):
    slots = torch.tensor([7, 1, 64, 30])
    before = _everything(pool)
    copy = pool.get_cpu_copy(slots)
    for buffer in pool.k_buffer + pool.v_buffer:
        buffer[slots] = 0
    pool.load_cpu_copy(copy, slots)
    assert all(torch.equal(was, buffer) for was, buffer in zip(before, _everything(pool), strict=True))


def test_moved_slots_keep_their_rows(pool):
    pool.use_native_move_kv_cache = True
    source, target = torch.tensor([3, 9]), torch.tensor([50, 4])
    before = _everything(pool)
    pool.move_kv_cache(target, source)
    for was, buffer in zip(before, pool.k_buffer + pool.v_buffer, strict=True):
        assert torch.equal(buffer[target], was[source])
        others = torch.ones(len(buffer), dtype=torch.bool).index_fill(0, target, False)
        assert torch.equal(buffer[others], was[others])


def test_the_gpu_s_slot_move_covers_the_longest_rows(pool, monkeypatch):
    """It moves as many tiles of every buffer; those of dense layers and values are longer than the first one's."""
    monkeypatch.setattr("sglang.srt.mem_cache.memory_pool.copy_all_layer_kv_cache_func", lambda *_: None)
    pool._init_kv_copy_and_warmup()
    config = pool._kv_copy_config
    moved = config["byte_tiles"] * config["bytes_per_tile"]
    assert moved >= max(math.prod(buffer.shape[1:]) for buffer in pool.k_buffer + pool.v_buffer)


def test_dense_writes_are_refused(pool):
    with pytest.raises(NotImplementedError, match="--kv-compress spark"):
        pool.set_kv_buffer(None, torch.tensor([1]), torch.zeros(1, 2, 128), torch.zeros(1, 2, 128))
