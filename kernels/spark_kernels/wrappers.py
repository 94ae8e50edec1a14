"""Attention as an attention backend calls it: plan once per step, run once per layer.

Arguments are checked here and named in errors; the work is done by the implementation of the tensors' device.
Functions and conventions follow FlashInfer's wrappers, ragged batches by indptr tensors; lse are natural logarithms.

What only a GPU knows is not checked, because to look at it is to wait for it: numbers in tensors on a GPU are taken as
they are.
"""

from __future__ import annotations

import torch

from spark_kernels.checks import (
    FLOAT_DTYPES,
    check_heads,
    check_indices,
    check_indptr,
    check_planned,
    check_rows,
    check_tensor,
)
from spark_kernels.implementation import implementation
from spark_kernels.rows import LayerRows


class SparkBatchDecodeWrapper:
    """Decode attention over rows: one query per request.

    In CUDA-graph mode (FlashInfer's ``use_cuda_graph``) a wrapper serves batches of one size. Everything that `run`
    reads besides its arguments stays where it is, so a captured `run` can be replayed after any later `plan`.

    Parameters
    ----------
    device
        Where the tensors of `run` will be.
    kv_indptr_buffer
        CUDA-graph mode, with ``kv_indices_buffer``: int32 ``[batch + 1]`` on the device. `plan` copies its
        ``kv_indptr`` here, unless it is this tensor.
    kv_indices_buffer
        int32 or int64 ``[most tokens]`` on the device, the same for ``kv_indices``.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        kv_indptr_buffer: torch.Tensor | None = None,
        kv_indices_buffer: torch.Tensor | None = None,
    ) -> None:
        self._device = torch.device(device)
        self._kernels = implementation(self._device)
        self._plan = None
        self._shape: tuple[int, int, int, int] | None = None
        self._buffers = (kv_indptr_buffer, kv_indices_buffer)
        self._is_fixed = kv_indptr_buffer is not None
        if self._is_fixed != (kv_indices_buffer is not None):
            raise ValueError("kv_indptr_buffer and kv_indices_buffer belong together: give both or none")
        if self._is_fixed and not self._kernels.CUDA_GRAPHS:
            raise NotImplementedError(f"kv_indptr_buffer: there are no CUDA graphs on device {device}")

    def plan(
        self, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim: int
    ) -> None:
        """Prepare one decode step, for all its layers. No GPU is waited for.

        Parameters
        ----------
        kv_indptr
            int32 or int64 ``[batch + 1]``, from 0, not decreasing; requests without tokens are allowed.
        kv_indices
            int32 or int64 ``[>= kv_indptr[-1]]``, the slots of request r's tokens are
            ``kv_indices[kv_indptr[r] : kv_indptr[r + 1]]``.
        num_qo_heads, num_kv_heads, head_dim
            Shape of queries and keys; in CUDA-graph mode the same in each call, as is the batch.
        """
        check_heads(num_qo_heads, num_kv_heads)
        total = check_indptr("kv_indptr", kv_indptr)
        slots = check_indices("kv_indices", kv_indices, total, self._device)
        kv_indptr = kv_indptr.to(self._device, non_blocking=True)
        shape = (kv_indptr.shape[0] - 1, num_qo_heads, num_kv_heads, head_dim)
        if not self._is_fixed:
            self._plan = self._kernels.DecodePlan.build(kv_indptr, kv_indices[:total], num_kv_heads)
        else:
            self._fill_buffers(kv_indptr, kv_indices, shape)
            if self._plan is None:
                self._plan = self._kernels.DecodePlan.build(*self._buffers, num_kv_heads)
            else:
                self._plan.fill(self._buffers[0], num_kv_heads)
        self._slots, self._shape = slots, shape

    def _fill_buffers(
        self, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, shape: tuple[int, int, int, int]
    ) -> None:
        indptr_buffer, indices_buffer = self._buffers
        if shape[0] != indptr_buffer.shape[0] - 1:
            raise ValueError(f"kv_indptr_buffer is for {indptr_buffer.shape[0] - 1} requests, kv_indptr has {shape[0]}")
        if self._shape not in (None, shape):
            raise ValueError(f"batch, num_qo_heads, num_kv_heads, head_dim are fixed at {self._shape}, got {shape}")
        if kv_indices.shape[0] > indices_buffer.shape[0]:
            raise ValueError(f"kv_indices_buffer holds {indices_buffer.shape[0]} slots, got {kv_indices.shape[0]}")
        for buffer, given in zip(self._buffers, (kv_indptr, kv_indices), strict=True):
            if given.data_ptr() != buffer.data_ptr():
                buffer[: given.shape[0]].copy_(given, non_blocking=True)

    def run(
        self,
        q: torch.Tensor,
        rows: LayerRows,
        *,
        sm_scale: float,
        logits_soft_cap: float = 0.0,
        v_scale: float = 1.0,
        sinks: torch.Tensor | None = None,
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
        sinks
            Float ``[num_qo_heads]``: the logit of one key more per head, whose value is 0 (gpt-oss's attention sinks).
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
        batch, num_qo_heads, num_kv_heads, head_dim = self._shape
        check_tensor("q", q, (batch, num_qo_heads, head_dim), FLOAT_DTYPES, self._device)
        check_rows(rows, num_kv_heads, head_dim, self._slots, "kv_indices", self._device)
        result, lse = self._kernels.decode_attention(
            q, rows, self._plan, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap, v_scale=v_scale
        )
        return _deliver(result, lse, q, sinks, out, return_lse)


class SparkBatchPrefillWrapper:
    """Attention of new chunks of tokens over themselves and over prefixes stored as rows.

    Parameters
    ----------
    device
        Where the tensors of `run` will be.
    segment_tokens
        Prefix tokens restored at a time; the workspace holds this many dense keys and values of all KV heads. The
        device's kernels choose if None.
    """

    def __init__(self, device: torch.device | str, segment_tokens: int | None = None) -> None:
        self._device = torch.device(device)
        self._kernels = implementation(self._device)
        self._segment_tokens = self._kernels.SEGMENT_TOKENS if segment_tokens is None else segment_tokens
        if self._segment_tokens < 1:
            raise ValueError(f"segment_tokens={segment_tokens} must be positive")
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

        This happens on the host: ``qo_indptr`` and ``prefix_indptr`` may be there already, and else are waited for.

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
        qo_indptr, prefix_indptr = qo_indptr.cpu(), prefix_indptr.cpu()
        tokens = check_indptr("qo_indptr", qo_indptr)
        total = check_indptr("prefix_indptr", prefix_indptr)
        if prefix_indptr.shape != qo_indptr.shape:
            raise ValueError(
                f"qo_indptr and prefix_indptr must have one length, got {len(qo_indptr)} and {len(prefix_indptr)}"
            )
        self._slots = check_indices("prefix_indices", prefix_indices, total, self._device)
        self._q_shape = (tokens, num_qo_heads, head_dim)
        self._num_kv_heads = num_kv_heads
        self._plan = self._kernels.ExtendPlan.build(
            qo_indptr, prefix_indptr, prefix_indices[:total], causal, self._segment_tokens, self._plan
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
        sinks: torch.Tensor | None = None,
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
        sm_scale, logits_soft_cap, sinks, out, return_lse
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
        return _deliver(result, lse, q, sinks, out, return_lse)


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
    out, lse = implementation(out_a.device).merge_state(out_a, lse_a, out_b, lse_b)
    return out.to(out_a.dtype), lse


def _deliver(
    result: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor | None,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    if sinks is not None:
        check_tensor("sinks", sinks, (q.shape[1],), FLOAT_DTYPES, result.device)
        # What is left to the keys.
        result = result * torch.sigmoid(lse - sinks)[..., None]
        lse = torch.logaddexp(lse, sinks.float())
    if out is None:
        out = result.to(q.dtype)
    else:
        check_tensor("out", out, tuple(result.shape), (q.dtype,), result.device)
        out.copy_(result)
    # An implementation may use its buffer for lse again.
    return (out, lse.clone()) if return_lse else out
