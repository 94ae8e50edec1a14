import pytest
import torch
from transformers import AutoModelForCausalLM

from eval.cache import SimulatedCache, forward
from eval.methods import RIVALS, Method, recipes
from eval.methods.fp8 import Fp8
from eval.offline import calibrate, documents, measure
from sglang_spark.calibration_text import STRETCHES


class Characters:
    """A tokenizer whose ids are characters."""

    def encode(self, text, add_special_tokens):
        return [ord(character) % 97 for character in text]

    def __call__(self, text):
        return {"input_ids": self.encode(text, False)}


@pytest.fixture
def calibration(model):
    with torch.inference_mode():
        return calibrate(model, Characters(), 4096)


def test_an_exact_cache_gives_the_models_own_logits(model, model_path, ids):
    plain = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.inference_mode():
        expected = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = forward(model, [SimulatedCache(Method(), 2)], ids, decoding=False)[0]
    # Not zero, because keys and values are rounded to bf16.
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-3


def test_decoding_over_an_exact_cache_is_the_prefill(model, ids):
    whole = forward(model, [SimulatedCache(Method(), 2)], ids, decoding=False)[0]
    first = SimulatedCache(Method(), 2)
    forward(model, [first], ids[:64], decoding=False)
    second = SimulatedCache(Method(), 2)
    second.start_from(first.last_chunks)
    torch.testing.assert_close(forward(model, [second], ids[64:], decoding=True)[0], whole[64:], atol=1e-3, rtol=1e-3)


def test_tokens_decoded_at_once_are_those_decoded_one_by_one(model, ids):
    def start():
        cache = SimulatedCache(Fp8(), 2)
        forward(model, [cache], ids[:80], decoding=False)
        return cache

    at_once = forward(model, [start()], ids[80:], decoding=True)[0]
    cache = start()
    singly = torch.cat([forward(model, [cache], [token], decoding=True)[0] for token in ids[80:]])
    torch.testing.assert_close(at_once, singly, atol=1e-3, rtol=1e-3)


def test_dense_loses_nothing_and_fp8_something(model, ids):
    with torch.inference_mode():
        dense, fp8 = measure(model, ids, 64, [Method(), Fp8()], 0)
    assert dense == {"kl": 0.0, "loss": 0.0, "top1": 1.0}
    assert 0 < fp8["kl"] < 0.5


def test_positions_are_moved(model, ids):
    near, far = (
        forward(model, [SimulatedCache(Method(), 2)], ids, decoding=False, offset=offset)[0] for offset in (0, 2000)
    )
    # Attention sees differences of positions only; bf16 keys are rounded differently.
    assert not torch.equal(near, far)
    assert (near.exp() - far.exp()).abs().max() < 0.05


def test_our_recipes_lose_less_the_more_they_store(model, ids, calibration):
    methods = {method.name: method for method in recipes(64, calibration)}
    chosen = [methods[f"spark, {name}"] for name in ("default", "small")]
    with torch.inference_mode():
        default, small = measure(model, ids, 64, chosen, 0)
    assert 0 < default["kl"] < small["kl"]


def test_calibration_has_the_statistics_of_its_text(model, calibration):
    keys = []
    for number, stretch in enumerate(STRETCHES):
        cache = SimulatedCache(Method(), 2)
        offset = number * (4096 - 64) // (len(STRETCHES) - 1)
        forward(model, [cache], Characters().encode(stretch, False)[:64], decoding=False, offset=offset)
        keys.append(cache.last_chunks[1].k)
    torch.testing.assert_close(calibration.centre[1], torch.cat(keys).mean(0))
    torch.testing.assert_close(calibration.deviation[1], torch.cat(keys).std(0, correction=0))


def test_documents_do_not_overlap_and_must_fit_the_text():
    first, second = documents(Characters(), 2, 1000)
    assert len(first) == len(second) == 1000
    assert first != second
    with pytest.raises(SystemExit, match="--documents=1000 of 100 tokens"):
        documents(Characters(), 1000, 100)


@pytest.mark.parametrize("method", RIVALS, ids=lambda method: method.name)
def test_every_rival_is_measured(model, ids, method):
    with torch.inference_mode():
        (result,) = measure(model, ids, 80, [method], 0)
    assert result["kl"] > 0
