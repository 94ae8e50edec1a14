"""The sharing conditions against a server with a scripted radix tree."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from accuracy.endpoint import Generated
from accuracy.metrics import NextToken
from accuracy.outcomes import Label
from accuracy.server_runs import Interview
from accuracy.sharing import (
    CONDITIONS,
    EVICTED,
    OTHER,
    OWN,
    SAME,
    ConditionNotMet,
    ask_condition,
    compare,
    shared_document,
)
from local_server import RECALL_MODEL
from recall_tasks import make_items

ITEMS = 10


def shared(one, other):
    """Length of the common prefix."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class CachingEndpoint:
    """Remembers the last `capacity` prompts as a radix tree would; its reply is token 0 whatever is asked."""

    def __init__(self, capacity):
        self.prompts_kept = capacity
        self.prompts = []

    def capacity(self):
        return self.prompts_kept * 310

    def generate(self, input_ids, *, max_new_tokens, top_logprobs=0, ignore_eos=True):
        cached = max((shared(input_ids[:-1], prompt) for prompt in self.prompts), default=0)
        self.prompts = [*self.prompts, input_ids][-self.prompts_kept :]
        step = NextToken(np.arange(4, dtype=np.int32), np.log(np.full(4, 0.25, dtype=np.float32)))
        return Generated([0] * max_new_tokens, [step] * max_new_tokens, cached)

    def flush_cache(self):
        self.prompts = []


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(RECALL_MODEL)


@pytest.fixture(scope="module")
def documents():
    return [shared_document(item) for item in make_items("kv_list", 1, ITEMS, 300, questions=2)]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_each_condition_has_the_cache_it_is_about(tokenizer, documents, condition):
    endpoint = CachingEndpoint(capacity=30)
    outcomes = ask_condition(Interview(endpoint, tokenizer, exact=True), documents, condition, "kv_list", {})
    assert [outcome.item for outcome in outcomes] == list(range(ITEMS))


@pytest.mark.parametrize(
    ("condition", "capacity"), [(SAME, 1), (OTHER, 1), (EVICTED, 1000)], ids=["same", "other", "evicted"]
)
def test_a_cache_in_another_state_is_noticed(tokenizer, documents, condition, capacity):
    class Faulty(CachingEndpoint):
        def generate(self, *args, **kwargs):
            if capacity == 1:
                self.prompts = []
            return super().generate(*args, **kwargs)

        def capacity(self):
            return 310

    interview = Interview(Faulty(capacity), tokenizer, exact=True)
    with pytest.raises(ConditionNotMet, match=f"{condition}: \\d+ of \\d+ prompt tokens came from the cache"):
        ask_condition(interview, documents, condition, "kv_list", {})


def test_only_the_document_is_shared(documents):
    for document in documents:
        questions = (document.asked, document.same, document.other)
        asked, same, other = (question.messages[-1]["content"] for question in questions)
        assert same.replace("\n\n", "\n") == asked and other.replace("\n\n", "\n") != asked
        for before in (same, other):
            assert asked[shared(asked, before) :].startswith("What is")


def test_differences_are_paired(tokenizer, documents):
    interview = Interview(CachingEndpoint(1000), tokenizer, exact=True)
    found = {
        condition: ask_condition(interview, documents, condition, "kv_list", {})
        for condition in (OWN, SAME, OTHER)
    }  # fmt: skip
    rows = compare(Label("spark", 0.8, 2), "kv_list", 300, {**found, EVICTED: found[OWN]})
    numbers = {(row.metric, row.against): row for row in rows}
    assert numbers[f"kl, {OTHER}", f"sharing, {OWN}"].mean == 0
    assert numbers[f"exact_match, {OWN}", "sharing"].n == ITEMS
