"""The canary notices a row that changed in any byte, or that was never written, and nothing else."""

from __future__ import annotations

import pytest
import torch
from row_pools import make_pool, pruned

from sglang_spark import canary
from sglang_spark.canary import RowChanged, RowHashes
from spark_kernels import Numbers

FIRST_LAYER = 5


@pytest.fixture
def pool():
    """32 slots of random bytes in two layers, one of whole keys."""
    key_formats = (pruned(128), Numbers(128, torch.bfloat16))
    pool = make_pool(32, key_formats, num_kv_heads=1, start_layer=FIRST_LAYER)
    for buffer in pool.k_buffer + pool.v_buffer:
        buffer.random_(0, 256)
    return pool


def test_rows_as_written_pass(pool):
    hashes = RowHashes(pool)
    slots = torch.tensor([4, 7, 1])
    for layer in (0, 1):
        hashes.record(FIRST_LAYER + layer, slots)
        hashes.check(FIRST_LAYER + layer, slots.flip(0))
        hashes.check(FIRST_LAYER + layer, slots[:0])


def test_a_change_in_any_byte_is_noticed(pool):
    hashes = RowHashes(pool)
    slots = torch.arange(1, 5)
    for layer, (keys, values) in enumerate(zip(pool.k_buffer, pool.v_buffer, strict=True)):
        hashes.record(FIRST_LAYER + layer, slots)
        for buffer in (keys, values):
            for byte in range(buffer.shape[2]):
                buffer[3, 0, byte] ^= 1 << byte % 8
                with pytest.raises(RowChanged, match=rf"layer {FIRST_LAYER + layer} .* changed .* slots 3$"):
                    hashes.check(FIRST_LAYER + layer, slots)
                buffer[3, 0, byte] ^= 1 << byte % 8
        hashes.check(FIRST_LAYER + layer, slots)


def test_exchanged_rows_are_noticed(pool):
    hashes = RowHashes(pool)
    hashes.record(FIRST_LAYER, torch.tensor([1, 2]))
    pool.k_buffer[0][[1, 2]] = pool.k_buffer[0][[2, 1]]
    with pytest.raises(RowChanged, match=r"slots 1, 2$"):
        hashes.check(FIRST_LAYER, torch.tensor([1, 2]))


def test_rows_that_were_never_written_are_noticed(pool):
    hashes = RowHashes(pool)
    hashes.record(FIRST_LAYER, torch.tensor([1, 2]))
    with pytest.raises(RowChanged, match="never written: slots 3"):
        hashes.check(FIRST_LAYER, torch.tensor([1, 3]))
    with pytest.raises(RowChanged, match="never written: slots 1"):
        hashes.check(FIRST_LAYER + 1, torch.tensor([1]))


def test_a_slot_may_be_written_again(pool):
    hashes = RowHashes(pool)
    slots = torch.tensor([9])
    hashes.record(FIRST_LAYER, slots)
    pool.v_buffer[0][9] = 0
    hashes.record(FIRST_LAYER, slots)
    hashes.check(FIRST_LAYER, slots)


def test_the_switch(monkeypatch):
    monkeypatch.delenv(canary.VARIABLE, raising=False)
    assert not canary.is_on()
    monkeypatch.setenv(canary.VARIABLE, "1")
    assert canary.is_on()
    monkeypatch.setenv(canary.VARIABLE, "yes")
    with pytest.raises(ValueError, match="SGLANG_SPARK_CANARY=yes: use 0 or 1"):
        canary.is_on()


def test_rows_that_the_pool_moves_are_known_where_they_went(pool):
    pool.use_native_move_kv_cache = True
    hashes = RowHashes(pool)
    hashes.record(FIRST_LAYER, torch.tensor([1, 2, 3]))
    pool.move_kv_cache(torch.tensor([2, 9]), torch.tensor([3, 1]))
    hashes.check(FIRST_LAYER, torch.tensor([1, 2, 3, 9]))
