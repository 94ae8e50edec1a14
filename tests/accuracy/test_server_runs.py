"""Asking a server, with a scripted one in its place."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from accuracy.endpoint import Generated
from accuracy.metrics import NextToken
from accuracy.outcomes import DENSE
from accuracy.server_campaign import Files, Plan, measure
from accuracy.server_runs import expected_ids, follow, prompt_ids
from accuracy.settings import Setting, spark
from accuracy.tasks import TASKS
from local_server import RECALL_MODEL

VOCABULARY = 1856
PROMPT = [7, 8]


class ScriptedEndpoint:
    """Answers `script` after any prompt; where the continuation so far is another, it goes on as if it were not."""

    def __init__(self, script):
        self.script = script
        self.requests = []

    def generate(self, input_ids, *, max_new_tokens, top_logprobs=0, ignore_eos=True):
        self.requests.append(list(input_ids))
        start = len(input_ids) - len(PROMPT)
        ids = self.script[start : start + max_new_tokens]
        return Generated(ids, [likely(token) for token in ids], 0)

    def has_logprobs(self):
        return True

    def flush_cache(self):
        pass


def likely(token):
    probabilities = np.full(VOCABULARY, 0.1 / (VOCABULARY - 1))
    probabilities[token] = 0.9
    return NextToken(np.arange(VOCABULARY, dtype=np.int32), np.log(probabilities).astype(np.float32))


def test_an_agreeing_server_is_asked_once():
    endpoint = ScriptedEndpoint([1, 2, 3])
    followed = follow(endpoint, PROMPT, [1, 2, 3])
    assert endpoint.requests == [PROMPT] and followed.reply == [1, 2, 3]
    assert [step.top for step in followed.steps] == [1, 2, 3]


def test_a_server_that_departs_is_put_back_on_the_expected_answer():
    endpoint = ScriptedEndpoint([1, 9, 3, 8, 5])
    followed = follow(endpoint, PROMPT, [1, 2, 3, 4, 5])
    assert endpoint.requests == [PROMPT, [*PROMPT, 1, 2], [*PROMPT, 1, 2, 3, 4]]
    assert [step.top for step in followed.steps] == [1, 9, 3, 8, 5]
    assert followed.reply == [1, 9, 3, 8, 5]


def test_a_reply_may_be_longer_than_what_is_scored():
    followed = follow(ScriptedEndpoint([1, 2, 3, 4]), PROMPT, [1, 2], reply_tokens=4)
    assert followed.reply == [1, 2, 3, 4] and len(followed.steps) == 2


class RecallingEndpoint(ScriptedEndpoint):
    """Gives every expected answer, but for prompts of `wrong`; counts its questions."""

    def __init__(self, tokenizer, items, wrong=()):
        super().__init__([])
        self.answers = {}
        self.asked = 0
        for number, item in enumerate(items):
            for turn, question in enumerate(item.questions):
                answer = expected_ids(tokenizer, question)
                script = [0] * len(answer) if (number, turn) in wrong else answer
                self.answers[tuple(prompt_ids(tokenizer, question))] = script

    def generate(self, input_ids, *, max_new_tokens, top_logprobs=0, ignore_eos=True):
        self.asked += 1
        prompt = max((p for p in self.answers if tuple(input_ids[: len(p)]) == p), key=len)
        start = len(input_ids) - len(prompt)
        ids = self.answers[prompt][start : start + max_new_tokens]
        return Generated(ids, [likely(token) for token in ids], 0)


@pytest.fixture
def campaign(tmp_path):
    plan = Plan((TASKS["kv_list"],), (200,), items=3, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(RECALL_MODEL)
    return plan, Files.open(tmp_path / "results", tmp_path / "work"), tokenizer


def run(campaign, setting, endpoint):
    plan, files, _ = campaign
    measure(setting, endpoint, 100.0, plan, files, str(RECALL_MODEL), exact=True)


def test_a_campaign_compares_with_dense_and_is_not_run_twice(campaign):
    _, files, tokenizer = campaign
    items = TASKS["kv_list"].make(5, 3, 200)
    dense, compressed = RecallingEndpoint(tokenizer, items), RecallingEndpoint(tokenizer, items, wrong={(1, 0)})
    run(campaign, Setting(DENSE), dense)
    run(campaign, spark(0.8, 2), compressed)
    rows = {row.method: row for row in files.rows.rows}
    assert (rows["dense"].exact_match, rows["dense"].kl) == (1.0, 0.0)
    assert rows["spark"].exact_match == pytest.approx(2 / 3, abs=1e-4) and rows["spark"].kl > 0.1
    (difference,) = files.comparisons.find(method="spark", metric="exact_match")
    assert difference.mean == pytest.approx(-1 / 3, abs=1e-4)
    asked = compressed.asked
    run(campaign, spark(0.8, 2), compressed)
    assert compressed.asked == asked


def test_dense_comes_first(campaign):
    _, _, tokenizer = campaign
    endpoint = RecallingEndpoint(tokenizer, TASKS["kv_list"].make(5, 3, 200))
    with pytest.raises(RuntimeError, match="measure the dense server on the same items first"):
        run(campaign, spark(0.8, 2), endpoint)
