"""The slots of a batch's tokens, by PyTorch's indexing."""

from __future__ import annotations

import torch


def fill_slots(
    req_to_token: torch.Tensor, req_pool_indices: torch.Tensor, kv_indptr: torch.Tensor, out: torch.Tensor
) -> None:
    """See `spark_kernels.implementation.Kernels`."""
    lengths = kv_indptr.diff()
    longest = int(lengths.max())
    taken = torch.arange(longest) < lengths[:, None]
    out[: int(kv_indptr[-1])] = req_to_token[req_pool_indices, :longest][taken]
