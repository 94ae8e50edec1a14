"""The operations as an attention backend calls them: plan once per step, run once per layer.

Arguments are checked here and named in errors; the work is done by the implementation of the tensors' device.
Functions and conventions follow FlashInfer's wrappers: ragged batches by indptr tensors, natural-log lse.
"""

from __future__ import annotations

from types import ModuleType

import torch

from spark_kernels.checks import (
    FLOAT_DTYPES,
    check_heads,
    check_indices,
    check_indptr,
    check_planned,
    check_rows,
    check_slots,
    check_tensor,
)
from spark_kernels.record import LayerRows


def _implementation(device: torch.device) -> ModuleType:
    """The kernels for a device. This is the only place that chooses."""
    if device.type == "cpu":
        from spark_kernels import cpu

        return cpu
    raise NotImplementedError(f"spark_kernels has no kernels for device {device} in this version: use device cpu")


class SparkBatchDecodeWrapper:
    """Decode attention over rows: one query per request.

    Parameters
    ----------
    device
        Where the tensors of `run` will be.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._kernels = _implementation(self._device)
        self._plan = None

    def plan(
        self, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim: int
    ) -> None:
        """Prepare one decode step, for all its layers.

        Parameters
        ----------
        kv_indptr
            int32 or int64 ``[batch + 1]``, from 0, not decreasing; requests without tokens are allowed.
        kv_indices
            int32 or int64 ``[>= kv_indptr[-1]]``, the slots of request r's tokens are
            ``kv_indices[kv_indptr[r] : kv_indptr[r + 1]]``.
        num_qo_heads, num_kv_heads, head_dim
            Shape of queries and keys.
        """
        check_heads(num_qo_heads, num_kv_heads)
        total = check_indptr("kv_indptr", kv_indptr)
        self._slots = check_indices("kv_indices", kv_indices, total)
        self._q_shape = (kv_indptr.shape[0] - 1, num_qo_heads, head_dim)
        self._num_kv_heads = num_kv_heads
        self._plan = self._kernels.DecodePlan.build(kv_indptr, kv_indices[:total])

    def run(
        self,
        q: torch.Tensor,
        rows: LayerRows,
        *,
        sm_scale: float,
        logits_soft_cap: float = 0.0,
        v_scale: float = 1.0,
        out: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of one layer.

        Parameters
        ----------
        q
            bfloat16, float16 or float32 ``[batch, num_qo_heads, head_dim]``.
        rows
            The layer's cache.
        sm_scale
            Factor of the logits, as a rule ``head_dim ** -0.5``.
        logits_soft_cap
            If c > 0, a logit x becomes ``c * tanh(x / c)``.
        v_scale
            Factor of the stored values, the one given to `write_rows`.
        out
            Where to write the result, dtype of ``q``, ``[batch, num_qo_heads, v_head_dim]``.
        return_lse
            Return the log-sum-exp of the logits too.

        Returns
        -------
        ``out``, or ``(out, lse)`` with lse float32 ``[batch, num_qo_heads]``. A request without tokens gets zeros and
        -inf.
        """
        check_planned(self._plan)
        check_tensor("q", q, self._q_shape, FLOAT_DTYPES, self._device)
        check_rows(rows, self._num_kv_heads, self._q_shape[2], self._slots, "kv_indices", self._device)
        result, lse = self._kernels.decode_attention(
            q, rows, self._plan, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap, v_scale=v_scale
        )
        return _deliver(result, lse, q, out, return_lse)


class SparkBatchPrefillWrapper:
    """Attention of new chunks of tokens over themselves and over prefixes stored as rows.

    Parameters
    ----------
    device
        Where the tensors of `run` will be.
    segment_tokens
        Prefix tokens restored at a time; the workspace holds this many dense keys and values of all KV heads.
    """

    def __init__(self, device: torch.device | str, segment_tokens: int = 2048) -> None:
        if segment_tokens < 1:
            raise ValueError(f"segment_tokens={segment_tokens} must be positive")
        self._device = torch.device(device)
        self._kernels = _implementation(self._device)
        self._segment_tokens = segment_tokens
        self._plan = None

    def plan(
        self,
        qo_indptr: torch.Tensor,
        prefix_indptr: torch.Tensor,
        prefix_indices: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = True,
    ) -> None:
        """Prepare one extend step, for all its layers.

        Parameters
        ----------
        qo_indptr
            int32 or int64 ``[batch + 1]``: the new tokens of request r are ``qo_indptr[r] .. qo_indptr[r + 1] - 1``
            of ``q``, ``k`` and ``v``.
        prefix_indptr, prefix_indices
            int32 or int64 ``[batch + 1]`` and ``[>= prefix_indptr[-1]]``: the slots of request r's prefix are
            ``prefix_indices[prefix_indptr[r] : prefix_indptr[r + 1]]``.
        num_qo_heads, num_kv_heads, head_dim
            Shape of queries and keys.
        causal
            Whether a token sees only itself and earlier tokens of its chunk. It sees all of the prefix in any case.
        """
        check_heads(num_qo_heads, num_kv_heads)
        tokens = check_indptr("qo_indptr", qo_indptr)
        total = check_indptr("prefix_indptr", prefix_indptr)
        if prefix_indptr.shape != qo_indptr.shape:
            raise ValueError(
                f"qo_indptr and prefix_indptr must have one length, got {len(qo_indptr)} and {len(prefix_indptr)}"
            )
        self._slots = check_indices("prefix_indices", prefix_indices, total)
        self._q_shape = (tokens, num_qo_heads, head_dim)
        self._num_kv_heads = num_kv_heads
        self._plan = self._kernels.ExtendPlan.build(
            qo_indptr, prefix_indptr, prefix_indices[:total], causal, self._segment_tokens
        )

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: LayerRows,
        *,
        sm_scale: float,
        logits_soft_cap: float = 0.0,
        v_scale: float = 1.0,
        out: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of one layer.

        Parameters
        ----------
        q
            bfloat16, float16 or float32 ``[num_tokens, num_qo_heads, head_dim]``.
        k, v
            The new tokens' own keys and values, ``[num_tokens, num_kv_heads, head_dim]`` (``v`` with its own
            head_dim), dtype of ``q``.
        rows
            The layer's cache; only the prefixes are read.
        sm_scale, logits_soft_cap, out, return_lse
            As in `SparkBatchDecodeWrapper.run`, with tokens in the place of requests.
        v_scale
            Factor of the stored values of the prefix; ``v`` is not scaled.

        Returns
        -------
        ``out``, or ``(out, lse)`` with lse float32 ``[num_tokens, num_qo_heads]``.
        """
        check_planned(self._plan)
        tokens, _, head_dim = self._q_shape
        v_head_dim = rows.value_format.head_dim
        check_tensor("q", q, self._q_shape, FLOAT_DTYPES, self._device)
        check_tensor("k", k, (tokens, self._num_kv_heads, head_dim), (q.dtype,), self._device)
        check_tensor("v", v, (tokens, self._num_kv_heads, v_head_dim), (q.dtype,), self._device)
        check_rows(rows, self._num_kv_heads, head_dim, self._slots, "prefix_indices", self._device)
        result, lse = self._kernels.extend_attention(
            q, k, v, rows, self._plan, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap, v_scale=v_scale
        )
        return _deliver(result, lse, q, out, return_lse)


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
    """Select channels, pack and store the keys and values of new tokens.

    Parameters
    ----------
    q
        bfloat16, float16 or float32 ``[num_tokens, num_qo_heads, head_dim]``, the tokens' queries: which channels of
        a key are kept depends on them (see `spark_kernels.reference.query_norms`).
    k, v
        Same dtypes, ``[num_tokens, num_kv_heads, head_dim]``, ``v`` with its own head_dim.
    slots
        int32 or int64 ``[num_tokens]``, where to store them.
    rows
        The layer's cache, changed in place.
    qo_indptr
        int32 or int64 ``[num_requests + 1]``: tokens of each request's chunk. None in decode, where each token is a
        request of its own.
    window
        Queries at the end of a chunk that decide (32 in SparK).
    v_scale
        ``v / v_scale`` is stored.
    """
    kernels = _implementation(rows.device)
    check_tensor("k", k, (k.shape[0], rows.num_kv_heads, rows.key_format.head_dim), FLOAT_DTYPES, rows.device)
    check_tensor("v", v, (k.shape[0], rows.num_kv_heads, rows.value_format.head_dim), FLOAT_DTYPES, rows.device)
    check_tensor("q", q, (k.shape[0], q.shape[1], rows.key_format.head_dim), FLOAT_DTYPES, rows.device)
    check_heads(q.shape[1], rows.num_kv_heads)
    check_slots("slots", check_indices("slots", slots, k.shape[0]), rows)
    if window < 1:
        raise ValueError(f"window={window} must be positive")
    if qo_indptr is not None and check_indptr("qo_indptr", qo_indptr) != k.shape[0]:
        raise ValueError(f"qo_indptr must end at the number of tokens {k.shape[0]}, got {int(qo_indptr[-1])}")
    kernels.write_rows(q, k, v, slots[: k.shape[0]], rows, qo_indptr=qo_indptr, window=window, v_scale=v_scale)


def restore_keys(rows: LayerRows, slots: torch.Tensor) -> torch.Tensor:
    """Keys at ``slots`` (int32 or int64 ``[n]``) as attention sees them, float32 ``[n, num_kv_heads, head_dim]``."""
    check_slots("slots", check_indices("slots", slots, slots.shape[0]), rows)
    return _implementation(rows.device).restore_keys(rows, slots)


def restore_values(rows: LayerRows, slots: torch.Tensor, v_scale: float = 1.0) -> torch.Tensor:
    """Values at ``slots`` (int32 or int64 ``[n]``), float32 ``[n, num_kv_heads, v_head_dim]``."""
    check_slots("slots", check_indices("slots", slots, slots.shape[0]), rows)
    return _implementation(rows.device).restore_values(rows, slots, v_scale).float()


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys from the attention over each, as FlashInfer's merge_state.

    Outputs are float ``[n, num_qo_heads, v_head_dim]``, lse are float32 natural logarithms ``[n, num_qo_heads]``,
    -inf for an empty set. Returns new tensors, the output in the dtype of ``out_a``.
    """
    check_tensor("out_a", out_a, out_a.shape, FLOAT_DTYPES, out_a.device)
    check_tensor("out_b", out_b, tuple(out_a.shape), FLOAT_DTYPES, out_a.device)
    check_tensor("lse_a", lse_a, tuple(out_a.shape[:2]), (torch.float32,), out_a.device)
    check_tensor("lse_b", lse_b, tuple(out_a.shape[:2]), (torch.float32,), out_a.device)
    out, lse = _implementation(out_a.device).merge_state(out_a, lse_a, out_b, lse_b)
    return out.to(out_a.dtype), lse


def _deliver(
    result: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, out: torch.Tensor | None, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if out is None:
        out = result.to(q.dtype)
    else:
        check_tensor("out", out, tuple(result.shape), (q.dtype,), result.device)
        out.copy_(result)
    return (out, lse) if return_lse else out
