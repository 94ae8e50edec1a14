"""The simulated cache on the bundled model: exact where nothing is compressed, and in the server's order of events."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from accuracy.simulation import Simulator, answer_all, judge
from accuracy.tasks import TASKS
from baselines import Fp8, SnapKV, Spark
from baselines.base import Method
from baselines.simulated_cache import LayerStore, SimulatedCache, causal_attention, forward, load_model
from local_server import RECALL_MODEL


@pytest.fixture(scope="module")
def simulator():
    return Simulator(load_model(str(RECALL_MODEL)), AutoTokenizer.from_pretrained(RECALL_MODEL))


@pytest.fixture(scope="module")
def items():
    return TASKS["multi_turn"].make(seed=3, count=2, length=200)


def test_an_uncompressed_cache_gives_the_model_s_own_distributions(simulator, items):
    model = AutoModelForCausalLM.from_pretrained(RECALL_MODEL, dtype=torch.float32).eval()
    conversation = simulator.conversation(items[0])
    (steps,) = simulator.answer(conversation, simulator.prefill(conversation), [Method()])
    for prompt, answer, found in zip(conversation.prompts, conversation.answers, steps, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        kl = (expected.exp() * (expected - found)).sum(-1)
        # Keys and values are rounded to bf16, as the server's pool does.
        assert found.shape == expected.shape and kl.max() < 1e-3


def test_methods_do_not_see_each_other(simulator, items):
    conversation = simulator.conversation(items[0])
    prefill = simulator.prefill(conversation)
    methods = [Spark(ratio=0.9, restore_bits=0), Method(), SnapKV(share=0.3), Fp8()]
    together = simulator.answer(conversation, prefill, methods)
    for method, steps in zip(methods, together, strict=True):
        (alone,) = simulator.answer(conversation, prefill, [method])
        for mine, theirs in zip(steps, alone, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_the_dense_cache_has_no_divergence_and_less_bytes_have_more(simulator, items):
    methods = [Method(), Spark(ratio=0.5), Spark(ratio=0.9, restore_bits=0)]
    outcomes = answer_all(simulator, items, methods, lambda: None)
    dense, half, tenth = (sum(sum(outcome.kl) for outcome in outcomes[method]) for method in methods)
    assert dense == 0 and dense <= half < tenth
    assert len(outcomes[methods[0]]) == sum(len(item.questions) for item in items)


def test_a_chunk_is_exact_to_itself_and_decoded_tokens_are_not(simulator):
    class Blank(Method):
        def keys(self, chunk):
            return torch.zeros_like(chunk.k)

    ids = list(range(20, 60))
    exact, blank = (SimulatedCache(method, simulator.num_layers) for method in (Method(), Blank()))
    prefills = [forward(simulator.model, [cache], ids, decoding=False) for cache in (exact, blank)]
    torch.testing.assert_close(*prefills)
    decoded = [forward(simulator.model, [cache], [61], decoding=True) for cache in (exact, blank)]
    assert (decoded[0] - decoded[1]).abs().max() > 0.01


def test_decode_steps_at_once_are_decode_steps_one_by_one(simulator):
    at_once, one_by_one = (SimulatedCache(Spark(ratio=0.8), simulator.num_layers) for _ in range(2))
    for cache in (at_once, one_by_one):
        forward(simulator.model, [cache], list(range(20, 60)), decoding=False)
    tokens = [100, 101, 102]
    expected = torch.cat([forward(simulator.model, [one_by_one], [token], decoding=True) for token in tokens], 1)
    torch.testing.assert_close(
        forward(simulator.model, [at_once], tokens, decoding=True), expected, rtol=1e-3, atol=1e-3
    )


def test_judging():
    logprobs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]).log()
    other = torch.tensor([[0.2, 0.7, 0.1], [0.1, 0.8, 0.1]]).log()
    conversation = type("Conversation", (), {"prompts": [[0]], "answers": [[0, 1]]})()
    (same,) = judge(4, conversation, [logprobs], [logprobs])
    (changed,) = judge(4, conversation, [other], [logprobs])
    assert (same.item, same.right, same.kl) == (4, 1.0, (0.0, 0.0))
    assert (changed.right, changed.token_hits, changed.agrees) == (0.0, (False, True), (False, True))
    assert changed.kl[0] > 0.1 and changed.kl[1] == 0


def test_attention_over_a_prefix_is_the_end_of_attention_over_everything():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 30, 16, generator=generator)
    k, v = (torch.randn(2, 30, 16, generator=generator) for _ in range(2))
    whole = causal_attention(q, k, v, 0.25)
    torch.testing.assert_close(causal_attention(q[:, 25:], k, v, 0.25), whole[:, 25:])


def test_a_layer_store_grows_and_drops_tokens():
    store = LayerStore()
    k, v = torch.randn(2, 600, 8), torch.randn(2, 600, 8)
    for start in range(0, 600, 200):
        store.append(k[:, start : start + 200], v[:, start : start + 200])
    torch.testing.assert_close(store.keys, k)
    torch.testing.assert_close(store.values, v)
    kept = torch.tensor([[0, 5, 599], [1, 2, 3]])
    store.keep(kept)
    torch.testing.assert_close(store.keys[0], k[0, [0, 5, 599]])
    torch.testing.assert_close(store.values[1], v[1, [1, 2, 3]])
