"""What drafted tokens attend to while they are verified: the prefix, and the drafts that lead to them.

Each of them is a decode of its own, over rows. A verified token therefore says what it would say without speculation,
and no kernel takes a mask: the tokens of a tree are told apart by their slots.
"""

from __future__ import annotations

import torch

from sglang_spark.attention.indices import fill_slots, indptr


def ancestors(
    tree_mask: torch.Tensor | None, prefix_lens: torch.Tensor, num_drafts: int, with_prefix: bool = True
) -> torch.Tensor:
    """Boolean ``[batch, num_drafts, num_drafts]``: whether a draft attends to another one, and to itself.

    Parameters
    ----------
    tree_mask
        SGLang's ``custom_mask`` (speculative/ngram_worker.py), flat: ``[num_drafts, prefix_len + num_drafts]`` per
        request; it may end before requests that pad a batch. None for a chain.
    prefix_lens
        integer ``[batch]``.
    num_drafts
        Drafts of each request.
    with_prefix
        False where the mask has the drafts only, as of SGLang's CPU engine.
    """
    batch, device = len(prefix_lens), prefix_lens.device
    if tree_mask is None:
        return torch.ones(num_drafts, num_drafts, dtype=torch.bool, device=device).tril().expand(batch, -1, -1)
    before = prefix_lens.long() if with_prefix else torch.zeros_like(prefix_lens, dtype=torch.int64)
    widths = before + num_drafts
    starts = (widths.cumsum(0) - widths) * num_drafts
    node = torch.arange(num_drafts, device=device)
    places = starts[:, None, None] + node[:, None] * widths[:, None, None] + before[:, None, None] + node
    return tree_mask[places.clamp(max=len(tree_mask) - 1)].bool()


def fill_draft_slots(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    prefix_lens: torch.Tensor,
    is_ancestor: torch.Tensor,
    kv_indptr: torch.Tensor | None,
    kv_indices: torch.Tensor,
) -> torch.Tensor:
    """The slots that each draft attends to, end to end. No GPU is waited for.

    Parameters
    ----------
    req_to_token, req_pool_indices
        As for `fill_slots`; the drafts' slots come after those of the prefix.
    prefix_lens
        integer ``[batch]``.
    is_ancestor
        From `ancestors`.
    kv_indptr
        int32 ``[batch * num_drafts + 1]`` to write to, or None.
    kv_indices
        int32, with room for `room` slots.

    Returns
    -------
    ``kv_indptr``: draft i of request r is its segment ``r * num_drafts + i``.
    """
    num_drafts = is_ancestor.shape[1]
    of_prefix = prefix_lens.repeat_interleave(num_drafts)
    lengths = of_prefix + is_ancestor.sum(2).flatten()
    kv_indptr = indptr(lengths, kv_indptr)
    fill_slots(req_to_token, req_pool_indices.repeat_interleave(num_drafts), lengths, kv_indptr, kv_indices)
    node = torch.arange(num_drafts, device=prefix_lens.device)
    slots = req_to_token[req_pool_indices[:, None], prefix_lens[:, None] + node][:, None, :].expand_as(is_ancestor)
    places = (kv_indptr[:-1] + of_prefix).view(-1, num_drafts, 1) + is_ancestor.cumsum(2) - 1
    # Others go to the last place, which no segment reaches.
    kv_indices.scatter_(0, places.where(is_ancestor, len(kv_indices) - 1).flatten(), slots.flatten())
    return kv_indptr


def room(prefix_tokens: int, batch: int, num_drafts: int) -> int:
    """Slots that ``kv_indices`` needs for prefixes of so many tokens together."""
    return num_drafts * prefix_tokens + batch * num_drafts**2 + 1
