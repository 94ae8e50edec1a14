"""Which slots a batch attends to, in FlashInfer's ragged form."""

from __future__ import annotations

import torch

from spark_kernels.implementation import implementation


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
    if lengths.numel():
        implementation(out.device).fill_slots(req_to_token, req_pool_indices, kv_indptr, out)
    return out
