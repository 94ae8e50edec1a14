"""What PD transfer and HiCache take for granted of a pool: pages can be copied by address, knowing only their size.

Both need a GPU to run; what they would be told about this pool, and that rows arrive by it, needs none.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from row_pools import make_pool, pruned
from sglang.srt.mem_cache.pool_host.mha import AsymmetricMHATokenToKVPoolHost

from sglang_spark.pool import SparkTokenToKVPool
from spark_kernels import Numbers, SparkBatchDecodeWrapper, write_rows

NUM_KV_HEADS, NUM_QO_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 2, 4, 128, 16, 8
PRUNED = pruned(HEAD_DIM)
LAYOUTS = {
    "all-layers-pruned": (PRUNED,) * 3,
    "one-dense-layer": (PRUNED, Numbers(HEAD_DIM, torch.bfloat16), PRUNED),
}


def _pool(layers: str) -> SparkTokenToKVPool:
    return make_pool(PAGE_SIZE * (NUM_PAGES - 1), LAYOUTS[layers], num_kv_heads=NUM_KV_HEADS, page_size=PAGE_SIZE)


def _fill(pool: SparkTokenToKVPool) -> None:
    """Rows as the write kernel makes them."""
    num_tokens = PAGE_SIZE * NUM_PAGES
    generator = torch.Generator().manual_seed(0)
    for layer_id in range(pool.layer_num):
        q = torch.randn(num_tokens, NUM_QO_HEADS, HEAD_DIM, generator=generator)
        k, v = torch.randn(2, num_tokens, NUM_KV_HEADS, HEAD_DIM, generator=generator)
        q, k, v = (tensor.bfloat16() for tensor in (q, k, v))
        write_rows(q, k, v, torch.arange(num_tokens), pool.layer_rows(layer_id))


def _slots(pages: list[int]) -> torch.Tensor:
    return (torch.tensor(pages, dtype=torch.int32)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten().int()


def _attention(pool: SparkTokenToKVPool, pages: list[int]) -> list[torch.Tensor]:
    """Decode attention of one query over the tokens of ``pages``, for every layer."""
    q = torch.randn(1, NUM_QO_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1)).bfloat16()
    slots = _slots(pages)
    wrapper = SparkBatchDecodeWrapper("cpu")
    kv_indptr = torch.tensor([0, len(slots)], dtype=torch.int32)
    wrapper.plan(kv_indptr, slots, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM)
    return [wrapper.run(q, pool.layer_rows(layer), sm_scale=HEAD_DIM**-0.5) for layer in range(pool.layer_num)]


@pytest.mark.parametrize("layers", LAYOUTS)
def test_pages_sent_by_address_are_read_as_they_were(layers):
    """As PD transfer sends them: for every buffer, page i of one server to page j of the other."""
    sender, receiver = _pool(layers), _pool(layers)
    _fill(sender)
    sent, received = [1, 5, 2], [6, 3, 4]
    parts = zip(*sender.get_contiguous_buf_infos(), *receiver.get_contiguous_buf_infos(), strict=True)
    for source, length, item, target, target_length, target_item in parts:
        assert (length, item) == (target_length, target_item) and length == NUM_PAGES * item
        for page, target_page in zip(sent, received, strict=True):
            ctypes.memmove(target + target_page * item, source + page * item, item)
    expected = _attention(sender, sent)
    assert all(torch.equal(a, b) for a, b in zip(expected, _attention(receiver, received), strict=True))
    for buffer in receiver.k_buffer + receiver.v_buffer:
        untouched = buffer[_slots([0, 1, 2, 5, 7]).long()]
        assert not untouched.any()


@pytest.mark.parametrize("layers", LAYOUTS)
def test_buffers_are_announced_keys_first(layers):
    """The order in which PD transfer splits the list, and the sizes of pages, layer by layer."""
    pool = _pool(layers)
    _, _, items = pool.get_contiguous_buf_infos()
    keys, values = items[: pool.layer_num], items[pool.layer_num :]
    per_row = PAGE_SIZE * NUM_KV_HEADS
    assert keys == [per_row * key_format.row_bytes for key_format in LAYOUTS[layers]]
    assert values == [per_row * 2 * HEAD_DIM] * pool.layer_num


def _host_pool(pool: SparkTokenToKVPool) -> AsymmetricMHATokenToKVPoolHost:
    """SGLang's own, for models whose keys and values differ in size, in the layout its kernels use."""
    return AsymmetricMHATokenToKVPoolHost(
        pool, host_to_device_ratio=2.0, host_size=0, page_size=PAGE_SIZE, layout="page_first", pin_memory=False
    )


def test_rows_survive_a_stay_in_the_host_pool():
    """As HiCache copies them: per layer, ``item_size`` bytes per token, at ``layout_dim`` bytes from each other."""
    pool = _pool("all-layers-pruned")
    _fill(pool)
    pages, host_slots = [1, 5, 2], slice(2 * PAGE_SIZE, 5 * PAGE_SIZE)
    expected = _attention(pool, pages)
    slots = _slots(pages).long()
    host = _host_pool(pool)
    assert host.size_per_token == pool.layout.bytes_per_token
    for buffers, stored, item in (
        (pool.k_buffer, host.k_buffer, host._k_token_stride_size()),
        (pool.v_buffer, host.v_buffer, host._v_token_stride_size()),
    ):
        for layer, buffer in enumerate(buffers):
            assert buffer[0].nbytes == item
            stored[host_slots, layer] = buffer[slots]
            buffer[slots] = 0
            buffer[slots] = stored[host_slots, layer]
    assert all(torch.equal(a, b) for a, b in zip(expected, _attention(pool, pages), strict=True))


def test_the_host_pool_cannot_hold_layers_of_unequal_rows():
    """Why HiCache has to stay refused with ``--spark-dense-layers``, on GPUs too."""
    pool = _pool("one-dense-layer")
    assert _host_pool(pool).size_per_token < pool.layout.bytes_per_token
