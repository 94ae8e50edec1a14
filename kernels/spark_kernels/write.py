"""Tokens into rows and back. Arguments are checked here and named in errors."""

from __future__ import annotations

import torch

from spark_kernels.checks import (
    FLOAT_DTYPES,
    check_heads,
    check_indices,
    check_indptr,
    check_planned,
    check_slots,
    check_tensor,
)
from spark_kernels.implementation import implementation
from spark_kernels.rows import LayerRows


class SparkBatchWriteWrapper:
    """Storing the keys and values of new tokens: selection of channels, packing, encoding.

    Parameters
    ----------
    device
        Where the tensors of `run` will be.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._kernels = implementation(self._device)
        self._slots: torch.Tensor | None = None

    def plan(self, slots: torch.Tensor, qo_indptr: torch.Tensor | None = None, window: int = 32) -> None:
        """Prepare one step, for all its layers. No GPU is waited for.

        Parameters
        ----------
        slots
            int32 or int64 ``[num_tokens]``, where to store the tokens. Read by `run`, so that what a captured CUDA
            graph stores can be moved by changing it in place.
        qo_indptr
            int32 or int64 ``[num_requests + 1]`` on the device: tokens of each request's chunk. None in decode, where
            each token is a request of its own.
        window
            Queries at the end of a chunk that decide which channels its keys keep (32 in SparK).
        """
        if window < 1:
            raise ValueError(f"window={window} must be positive")
        num_tokens = slots.shape[0]
        end = None if qo_indptr is None else check_indptr("qo_indptr", qo_indptr)
        if end is not None and end != num_tokens:
            raise ValueError(f"qo_indptr must end at the number of tokens {num_tokens}, got {end}")
        self._range = check_indices("slots", slots, num_tokens, self._device)
        self._slots, self._qo_indptr, self._window = slots, qo_indptr, window

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: LayerRows, *, v_scale: float = 1.0) -> None:
        """Store one layer's tokens.

        Parameters
        ----------
        q
            bfloat16, float16 or float32 ``[num_tokens, num_qo_heads, head_dim]``, the tokens' queries: which channels
            of a key are kept depends on them (see `spark_kernels.reference.query_squares`).
        k, v
            Same dtypes, ``[num_tokens, num_kv_heads, head_dim]``, ``v`` with its own head_dim.
        rows
            The layer's cache, changed in place.
        v_scale
            ``v / v_scale`` is stored.
        """
        check_planned(self._slots)
        num_tokens, num_kv_heads = self._slots.shape[0], rows.num_kv_heads
        check_tensor("k", k, (num_tokens, num_kv_heads, rows.key_format.head_dim), FLOAT_DTYPES, rows.device)
        check_tensor("v", v, (num_tokens, num_kv_heads, rows.value_format.head_dim), FLOAT_DTYPES, rows.device)
        check_tensor("q", q, (num_tokens, q.shape[1], rows.key_format.head_dim), FLOAT_DTYPES, rows.device)
        check_heads(q.shape[1], num_kv_heads)
        check_slots("slots", self._range, rows)
        self._kernels.write_rows(
            q, k, v, self._slots, rows, qo_indptr=self._qo_indptr, window=self._window, v_scale=v_scale
        )


def write_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    rows: LayerRows,
    *,
    qo_indptr: torch.Tensor | None = None,
    window: int = 32,
    v_scale: float = 1.0,
) -> None:
    """`SparkBatchWriteWrapper.plan` and ``run`` in one, for a single layer."""
    wrapper = SparkBatchWriteWrapper(rows.device)
    wrapper.plan(slots, qo_indptr, window)
    wrapper.run(q, k, v, rows, v_scale=v_scale)


def restore_keys(rows: LayerRows, slots: torch.Tensor) -> torch.Tensor:
    """Keys at ``slots`` (int32 or int64 ``[n]``) as attention sees them, float32 ``[n, num_kv_heads, head_dim]``."""
    check_slots("slots", check_indices("slots", slots, slots.shape[0], rows.device), rows)
    return implementation(rows.device).restore_keys(rows, slots)


def restore_values(rows: LayerRows, slots: torch.Tensor, v_scale: float = 1.0) -> torch.Tensor:
    """Values at ``slots`` (int32 or int64 ``[n]``), float32 ``[n, num_kv_heads, v_head_dim]``."""
    check_slots("slots", check_indices("slots", slots, slots.shape[0], rows.device), rows)
    return implementation(rows.device).restore_values(rows, slots, v_scale).float()
