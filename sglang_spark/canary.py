"""A check for tests: every row is hashed when it is written and compared before attention reads it.

``SGLANG_SPARK_CANARY=1`` turns it on. Something that changes a row between its write and a later read (an allocator
that hands out a slot twice, a copy that goes astray, a kernel that writes past its row) then stops the scheduler,
where without it another request's answer would quietly be wrong. It reads all rows once more and waits for the device
at every layer: not for serving.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch

from sglang_spark.attention.backend import SparkAttnBackend
from sglang_spark.attention.indices import fill_slots, indptr
from sglang_spark.pool import SparkTokenToKVPool

VARIABLE = "SGLANG_SPARK_CANARY"
_WORD_BYTES = 8


def is_on() -> bool:
    """Whether the environment asks for it.

    Raises
    ------
    ValueError
        The variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE}={value}: use 0 or 1")
    return value == "1"


class RowChanged(RuntimeError):
    """A row is not what was written, or was never written."""


class RowHashes:
    """Hashes of the rows of a pool, as last written.

    Parameters
    ----------
    pool
        The pool whose rows are watched.
    """

    def __init__(self, pool: SparkTokenToKVPool):
        self._pool = pool
        num_slots = len(pool.k_buffer[0])
        self._hashes = torch.zeros(pool.layer_num, num_slots, dtype=torch.int64, device=pool.device)
        self._is_written = torch.zeros(pool.layer_num, num_slots, dtype=torch.bool, device=pool.device)
        # Odd factors: a change of one word always changes the sum modulo 2**64.
        self._factors = {}
        generator = torch.Generator().manual_seed(0)
        for buffer in pool.k_buffer + pool.v_buffer:
            words = buffer[0].nbytes // _WORD_BYTES
            factors = torch.randint(-(2**62), 2**62, (words,), generator=generator) * 2 + 1
            self._factors[buffer.data_ptr()] = factors.to(pool.device)

        move = pool.move_kv_cache

        def moved(tgt_loc, src_loc):
            """Accepted drafts go where the next tokens belong."""
            move(tgt_loc, src_loc)
            for known in (self._hashes, self._is_written):
                known[:, tgt_loc] = known[:, src_loc]

        pool.move_kv_cache = moved

    def record(self, layer_id: int, slots: torch.Tensor) -> None:
        """Take the rows of ``slots`` (integer ``[num_tokens]``) in a layer (global id) for what they should be."""
        layer = self._pool.place(layer_id)
        self._hashes[layer, slots] = self._hash(layer, slots)
        self._is_written[layer, slots] = True

    def check(self, layer_id: int, slots: torch.Tensor) -> None:
        """Compare the rows of ``slots`` (integer ``[num_tokens]``) in a layer (global id) with what was written.

        Raises
        ------
        RowChanged
            Names the layer and the slots.
        """
        layer = self._pool.place(layer_id)
        is_written = self._is_written[layer, slots]
        if not is_written.all():
            raise RowChanged(f"layer {layer_id} reads rows that were never written: slots {_few(slots[~is_written])}")
        is_same = self._hash(layer, slots) == self._hashes[layer, slots]
        if not is_same.all():
            raise RowChanged(
                f"layer {layer_id} reads rows that changed since their write: slots {_few(slots[~is_same])}"
            )

    def _hash(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """int64 ``[num_tokens]``."""
        total = torch.zeros(len(slots), dtype=torch.int64, device=slots.device)
        for buffer in (self._pool.k_buffer[layer], self._pool.v_buffer[layer]):
            words = buffer[slots].flatten(1).view(torch.int64)
            total += (words * self._factors[buffer.data_ptr()]).sum(dim=1)
        return total


def watched(backend_class: type[SparkAttnBackend]) -> type[SparkAttnBackend]:
    """A backend that checks every row before it reads it."""
    return type(f"Watched{backend_class.__name__}", (CanaryBackend, backend_class), {})


class CanaryBackend(SparkAttnBackend):
    """Put before a backend of SparK's by `watched`.

    Raises
    ------
    RowChanged
        From any forward pass.
    RuntimeError
        CUDA graphs are on.
    """

    def __init__(self, model_runner):
        super().__init__(model_runner)
        self._hashes = RowHashes(self.pool)
        # Slots of the batch at hand that attention reads and the batch did not write.
        self._read = torch.zeros(0, dtype=torch.int64)

    def init_cuda_graph_state(self, max_bs, max_num_tokens):
        raise RuntimeError(f"{VARIABLE}=1 cannot look at rows within a CUDA graph: add --disable-cuda-graph")

    def init_forward_metadata(self, forward_batch):
        super().init_forward_metadata(forward_batch)
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        if mode.is_target_verify():
            lengths = forward_batch.seq_lens
        else:
            lengths = forward_batch.seq_lens - 1 if mode.is_decode() else forward_batch.extend_prefix_lens
        kv_indptr = indptr(lengths)
        read = torch.empty(int(kv_indptr[-1]), dtype=torch.int64, device=self.device)
        self._read = fill_slots(self.req_to_token, forward_batch.req_pool_indices, lengths, kv_indptr, read)
        clash = forward_batch.out_cache_loc[torch.isin(forward_batch.out_cache_loc, self._read)]
        if len(clash):
            raise RowChanged(f"a batch writes slots that it also reads: {_few(clash)}")

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        with self._checked(layer.layer_id, forward_batch.out_cache_loc):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        with self._checked(layer.layer_id, forward_batch.out_cache_loc):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)

    @contextmanager
    def _checked(self, layer_id, written):
        has_rows = self.pool.place(layer_id) is not None
        if has_rows:
            self._hashes.check(layer_id, self._read)
        yield
        if has_rows:
            self._hashes.record(layer_id, written)


def _few(slots: torch.Tensor) -> str:
    listed = ", ".join(map(str, slots[:8].tolist()))
    return listed if len(slots) <= 8 else f"{listed} and {len(slots) - 8} more"
