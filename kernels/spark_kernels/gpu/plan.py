"""How decode attention over a ragged batch is split into programs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

# Programs that should run at once on each SM, to hide each other's loads.
_PROGRAMS_PER_SM = 4
# Below this a split's own cost, its lookup tables and its partial result, is no longer small.
_SHORTEST_SPLIT = 512
_SPLIT_STEP = 128
# Where there is no GPU to ask: that of an H100.
_DEFAULT_SMS = 132


@dataclass(frozen=True)
class DecodePlan:
    """Splits of one decode step, for all its layers.

    Parameters
    ----------
    kv_indices
        int32 or int64, the slots of the batch's tokens.
    split_request, split_start, split_stop
        int32 ``[num_splits]``, each split's request and its range in ``kv_indices``; never empty.
    request_splits
        int32 ``[batch + 1]``, the splits of request r are ``request_splits[r] .. request_splits[r + 1] - 1``.
    """

    kv_indices: torch.Tensor
    split_request: torch.Tensor
    split_start: torch.Tensor
    split_stop: torch.Tensor
    request_splits: torch.Tensor

    @classmethod
    def build(cls, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, num_kv_heads: int = 1) -> DecodePlan:
        """Splits of one length for the whole batch, so that all its tokens together give every SM enough programs.

        A single long request is then cut into many, and each of many short ones is left whole. ``num_kv_heads`` is
        the number of programs per split; a number too small gives more splits than it takes, down to
        512 tokens. Reads ``kv_indptr`` on the host.
        """
        bounds = kv_indptr.to("cpu", torch.int64).numpy()
        length = split_length(int(bounds[-1]), num_kv_heads, _num_sms(kv_indices.device))
        splits = -(-np.diff(bounds) // length)
        request_splits = np.concatenate([[0], np.cumsum(splits)])
        split_request = np.repeat(np.arange(splits.shape[0]), splits)
        within = np.arange(split_request.shape[0]) - request_splits[split_request]
        start = bounds[split_request] + within * length
        stop = np.minimum(start + length, bounds[split_request + 1])
        device = kv_indices.device
        return cls(
            kv_indices,
            *(torch.from_numpy(x.astype(np.int32)).to(device) for x in (split_request, start, stop, request_splits)),
        )


def split_length(num_tokens: int, num_kv_heads: int, num_sms: int) -> int:
    """Tokens per split of a batch with ``num_tokens`` in all."""
    splits = max(1, _PROGRAMS_PER_SM * num_sms // num_kv_heads)
    return max(_SHORTEST_SPLIT, -(-num_tokens // (splits * _SPLIT_STEP)) * _SPLIT_STEP)


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _DEFAULT_SMS
