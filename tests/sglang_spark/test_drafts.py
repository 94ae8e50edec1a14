"""Which slots drafted tokens attend to."""

from __future__ import annotations

import pytest
import torch

from sglang_spark.attention import drafts

REQ_TO_TOKEN = torch.randperm(200).view(4, 50).int()
# Node by node, whom it attends to: a chain; a fork after the first; one draft and two that stand for none.
CHAIN = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
FORK = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
PADDED = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
REQUESTS, PREFIXES, TREES = [3, 0, 2], [7, 0, 30], [FORK, CHAIN, PADDED]


def _mask(trees, prefixes, with_prefix: bool) -> torch.Tensor:
    """As SGLang hands it on."""
    parts = []
    for tree, prefix in zip(trees, prefixes, strict=True):
        before = torch.ones(4, prefix, dtype=torch.bool) if with_prefix else torch.ones(4, 0, dtype=torch.bool)
        parts.append(torch.cat([before, torch.tensor(tree, dtype=torch.bool)], dim=1).flatten())
    return torch.cat(parts)


@pytest.mark.parametrize("with_prefix", [True, False])
def test_ancestors_are_read_from_sglangs_mask(with_prefix):
    mask = _mask(TREES, PREFIXES, with_prefix)
    found = drafts.ancestors(mask, torch.tensor(PREFIXES), 4, with_prefix)
    assert found.tolist() == torch.tensor(TREES).bool().tolist()


def test_without_a_mask_drafts_are_a_chain():
    assert drafts.ancestors(None, torch.tensor([5, 6]), 4).tolist() == torch.tensor([CHAIN, CHAIN]).bool().tolist()


def test_requests_that_pad_a_batch_may_be_beyond_the_mask():
    found = drafts.ancestors(_mask(TREES, PREFIXES, True), torch.tensor([*PREFIXES, 1, 1]), 4)
    assert found[:3].tolist() == torch.tensor(TREES).bool().tolist()


@pytest.mark.parametrize("is_given", [True, False], ids=["buffers", "new"])
def test_a_draft_attends_to_the_prefix_and_to_what_leads_to_it(is_given):
    kv_indices = torch.full((drafts.room(sum(PREFIXES), 3, 4) + 10 * is_given,), -1, dtype=torch.int32)
    kv_indptr = torch.full((13,), -1, dtype=torch.int32) if is_given else None
    kv_indptr = drafts.fill_draft_slots(
        REQ_TO_TOKEN,
        torch.tensor(REQUESTS),
        torch.tensor(PREFIXES),
        torch.tensor(TREES).bool(),
        kv_indptr,
        kv_indices,
    )
    for r, (request, prefix, tree) in enumerate(zip(REQUESTS, PREFIXES, TREES, strict=True)):
        for i, attends in enumerate(tree):
            slots = REQ_TO_TOKEN[request]
            expected = [*slots[:prefix].tolist(), *(int(slots[prefix + j]) for j in range(4) if attends[j])]
            first, last = kv_indptr[r * 4 + i : r * 4 + i + 2]
            assert kv_indices[first:last].tolist() == expected
    assert kv_indptr[-1] < len(kv_indices)
