"""Which kernels serve a device, and what they have to be."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from triton import knobs

from spark_kernels.rows import LayerRows


class Kernels(Protocol):
    """What `spark_kernels.cpu` and `spark_kernels.gpu` are; `spark_kernels.reference` has the definitions.

    Arguments have been checked by the wrappers. Results may be buffers that the next call uses again.

    Attributes
    ----------
    CUDA_GRAPHS
        Whether decode can be captured: a decode plan can then be filled again in place.
    SEGMENT_TOKENS
        Prefix tokens that extend restores at a time if not said otherwise.
    DecodePlan
        ``build(kv_indptr, kv_indices, num_kv_heads)`` plans a decode step for all layers.
    ExtendPlan
        ``build(qo_indptr, prefix_indptr, prefix_indices, causal, segment_tokens, previous)`` plans an extend step;
        ``previous`` is a plan that will not be run again.
    """

    CUDA_GRAPHS: bool
    SEGMENT_TOKENS: int
    DecodePlan: Any
    ExtendPlan: Any

    @staticmethod
    def write_rows(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slots: torch.Tensor,
        rows: LayerRows,
        *,
        qo_indptr: torch.Tensor | None,
        window: int,
        v_scale: float,
    ) -> None:
        """Fill the rows at ``slots``; without ``qo_indptr`` each token is a request of its own."""

    @staticmethod
    def restore_keys(rows: LayerRows, slots: torch.Tensor) -> torch.Tensor:
        """Float32 ``[n, num_kv_heads, head_dim]``."""

    @staticmethod
    def restore_values(rows: LayerRows, slots: torch.Tensor, v_scale: float) -> torch.Tensor:
        """Float ``[n, num_kv_heads, v_head_dim]``."""

    @staticmethod
    def decode_attention(
        q: torch.Tensor, rows: LayerRows, plan: Any, *, sm_scale: float, logits_soft_cap: float, v_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``[batch, num_qo_heads, v_head_dim]`` and natural-log lse, float32 ``[batch, num_qo_heads]``."""

    @staticmethod
    def extend_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rows: LayerRows,
        plan: Any,
        *,
        sm_scale: float,
        logits_soft_cap: float,
        v_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same per new token."""

    @staticmethod
    def merge_state(
        out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over both of two sets of keys, in float32; nothing given is changed."""

    @staticmethod
    def fill_slots(
        req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, kv_indptr: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Write the first slots of every request end to end, as many as ``kv_indptr`` leaves room for.

        ``req_to_token`` is int32 ``[max_requests, max_context_len]``, ``req_pool_indices`` int64 ``[batch]`` its rows,
        ``kv_indptr`` int32 ``[batch + 1]``; request r's go to ``out[kv_indptr[r] : kv_indptr[r + 1]]``, int32 or int64.
        """


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels take tensors of ``device``."""
    # PyTorch calls AMD's GPUs cuda too.
    return device.type == "cuda" or (device.type == "cpu" and knobs.runtime.interpret)


def implementation(device: torch.device) -> Kernels:
    """The kernels for a device. This is the only place that chooses.

    On GPUs they are Triton's, and on the CPU numba's, unless Triton interprets its kernels (``TRITON_INTERPRET=1``):
    then everything can run through them without a GPU.

    Raises
    ------
    NotImplementedError
        There are none for this device.
    """
    if runs_triton(device):
        from spark_kernels import gpu

        return gpu
    if device.type == "cpu":
        from spark_kernels import cpu

        return cpu
    raise NotImplementedError(f"spark_kernels has no kernels for device {device}: use cpu or cuda")
