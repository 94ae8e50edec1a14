"""Which slots a batch attends to, in FlashInfer's ragged form."""

from __future__ import annotations

import torch

from spark_kernels.implementation import runs_triton


def indptr(lengths: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """int32 ``[batch + 1]``: where each request's part begins and the last one ends; to ``out`` if given."""
    if out is None:
        out = torch.empty(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    out[:1].zero_()
    torch.cumsum(lengths, dim=0, out=out[1:])
    return out


def fill_slots(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    lengths: torch.Tensor,
    kv_indptr: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """The first ``lengths[i]`` slots of every request, end to end. No GPU is waited for.

    Parameters
    ----------
    req_to_token
        int32 ``[max_requests, max_context_len]``: slot of every token of every request.
    req_pool_indices
        int64 ``[batch]``: rows of ``req_to_token``.
    lengths
        int32 or int64 ``[batch]``: tokens to take of each.
    kv_indptr
        int32 ``[batch + 1]``, from `indptr`.
    out
        int32 ``[>= sum(lengths)]``: request i's slots go to ``out[kv_indptr[i] : kv_indptr[i + 1]]``.

    Returns
    -------
    ``out``
    """
    if lengths.numel() == 0:
        return out
    if runs_triton(out.device):
        _slots_kernel()[(lengths.numel(),)](
            req_to_token, req_pool_indices, lengths, kv_indptr, None, out, req_to_token.stride(0)
        )
        return out
    longest = int(lengths.max())
    taken = torch.arange(longest) < lengths[:, None]
    out[: int(kv_indptr[-1])] = req_to_token[req_pool_indices, :longest][taken]
    return out


def _slots_kernel():
    """``kernel[(batch,)](req_to_token, req_pool_indices, lengths, kv_indptr, None, out, stride)`` of SGLang."""
    try:
        from sglang.kernels.ops.attention.kv_indices import create_flashinfer_kv_indices_triton
    except ModuleNotFoundError:  # up to 0.5.22
        from sglang.kernels.ops.kvcache.kv_indices import create_flashinfer_kv_indices_triton
    return create_flashinfer_kv_indices_triton
