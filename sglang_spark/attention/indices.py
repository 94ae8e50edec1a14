"""Which slots a batch attends to, in FlashInfer's ragged form."""

from __future__ import annotations

import torch


def ragged_slots(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``lengths[i]`` slots of every request, end to end.

    Parameters
    ----------
    req_to_token
        int32 ``[max_requests, max_context_len]``: slot of every token of every request.
    req_pool_indices
        int64 ``[batch]``: rows of ``req_to_token``.
    lengths
        int32 or int64 ``[batch]``: tokens to take of each.

    Returns
    -------
    kv_indptr
        int32 ``[batch + 1]``: request i's slots are ``kv_indices[kv_indptr[i]:kv_indptr[i + 1]]``.
    kv_indices
        int32 ``[sum(lengths)]``.
    """
    kv_indptr = indptr(lengths)
    longest = int(lengths.max()) if lengths.numel() else 0
    slots = req_to_token[req_pool_indices, :longest]
    taken = torch.arange(longest, device=lengths.device) < lengths[:, None]
    return kv_indptr, slots[taken]


def indptr(lengths: torch.Tensor) -> torch.Tensor:
    """int32 ``[batch + 1]``: where each request's part begins and the last one ends."""
    bounds = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, dim=0, out=bounds[1:])
    return bounds
