"""The recall tasks, the tokenizer made for them, and a sample of the bundled model's answers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import recall_tasks
from recall_tasks import KINDS, make_items

MODEL = Path(recall_tasks.__file__).parent / "recall-model"
TURN_END = "<|end|>"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_items_depend_on_nothing_but_their_seed(kind):
    assert make_items(kind, 3, 4, 200) == make_items(kind, 3, 6, 200)[:4]
    assert make_items(kind, 3, 4, 200) != make_items(kind, 4, 4, 200)


@pytest.mark.parametrize("unfamiliar", [False, True], ids=["listed-words", "made-up-words"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_stands_once_in_the_document(kind, unfamiliar):
    for item in make_items(kind, 0, 20, 400, unfamiliar=unfamiliar):
        for turn in item.turns:
            assert item.document.count(turn.answer) == 1
            assert turn.value in turn.answer
            assert turn.value not in turn.question
            assert turn.is_exact(f" {turn.answer}\n") and turn.is_correct(f" {turn.value}.\nQuestion: Who")
            assert not turn.is_correct("I do not know.\n" + turn.answer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_has_one_answer(kind):
    for item in make_items(kind, 1, 20, 400):
        answers = {}
        for turn in item.turns:
            assert answers.setdefault(turn.question, turn.answer) == turn.answer


def test_multi_turn_items_come_back_to_earlier_questions():
    items = make_items("multi_turn", 0, 40, 300)
    assert any(len({turn.question for turn in item.turns}) < len(item.turns) for item in items)


def test_the_numbers_of_facts_and_questions_can_be_set():
    (item,) = make_items("multi_needle", 0, 1, 600, facts=9, questions=4)
    assert len(item.turns) == 4
    assert len({turn.question for turn in item.turns}) == 4


@pytest.mark.parametrize("target", [200, 1000, 2000])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_close_to_their_target_and_never_over(kind, target, tokenizer):
    for item in make_items(kind, 0, 5, target):
        size = recall_tasks.count_tokens(item.document)
        assert target - 20 <= size <= target
        assert len(encode(tokenizer, item.document)) == size


def test_every_word_is_one_token(tokenizer):
    split = [word for word in recall_tasks.vocabulary() if len(encode(tokenizer, word)) != 1]
    assert split == []


@pytest.mark.parametrize("kind", KINDS)
def test_generated_text_is_made_of_whole_word_tokens(kind, tokenizer):
    words = set(recall_tasks.vocabulary())
    for item in make_items(kind, 2, 20, 300):
        pieces = [tokenizer.decode([token]) for token in encode(tokenizer, item.plain_prompt(len(item.turns) - 1))]
        assert set(pieces) <= words


@pytest.mark.parametrize(
    "text",
    ["The code for the red falcon is 412 907.", '{"größe": [1, 2.5e-3]}\n\n', "  two  spaces\tand a tab", "日本語 🚀"],
)
def test_any_text_survives_the_tokenizer(text, tokenizer):
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_all_bytes_are_in_the_vocabulary(tokenizer):
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(ByteLevel.alphabet()) <= set(tokenizer.get_vocab())


@pytest.mark.parametrize("system", [True, False], ids=["system", "no-system"])
def test_a_conversation_is_a_prefix_of_its_continuation(system, tokenizer):
    """What the radix cache shares between turns depends on it, as text and as tokens."""
    item = next(item for item in make_items("multi_turn", 5, 20, 200) if bool(item.system) == system)
    for turn in range(len(item.turns) - 1):
        prompts = [
            tokenizer.apply_chat_template(item.messages(index), add_generation_prompt=True, tokenize=False)
            for index in (turn, turn + 1)
        ]
        history = prompts[0] + item.turns[turn].answer + TURN_END
        assert prompts[1].startswith(history)
        ids, longer = encode(tokenizer, history), encode(tokenizer, prompts[1])
        assert longer[: len(ids)] == ids


def test_plain_prompts_grow_by_whole_turns(tokenizer):
    (item,) = make_items("multi_turn", 5, 1, 200)
    for turn in range(len(item.turns) - 1):
        assert item.plain_prompt(turn + 1).startswith(f"{item.plain_prompt(turn)} {item.turns[turn].answer}\n")


def test_both_forms_begin_with_one_bos(tokenizer):
    (item,) = make_items("single_needle", 0, 1, 100)
    chat = tokenizer.apply_chat_template(item.messages(), add_generation_prompt=True, return_dict=False)
    for ids in (chat, tokenizer.encode(item.plain_prompt())):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_the_model_stops_at_the_end_of_a_turn(tokenizer):
    config = json.loads((MODEL / "config.json").read_text())
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert tokenizer.convert_tokens_to_ids(TURN_END) == config["eos_token_id"] == generation["eos_token_id"]
    assert config["vocab_size"] >= len(tokenizer)


def test_the_bundled_model_stays_small():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 10_000_000


@pytest.mark.parametrize("form", ["chat", "plain"])
def test_the_model_answers_from_the_document(form, model, tokenizer):
    """A sample by real greedy decoding; the model card has the measurement."""
    exact = 0
    items = make_items("single_needle", 11, 10, 300)
    for item in items:
        if form == "chat":
            ids = tokenizer.apply_chat_template(item.messages(), add_generation_prompt=True, return_dict=False)
        else:
            ids = tokenizer.encode(item.plain_prompt())
        output = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
        assert output[-1] == tokenizer.eos_token_id
        exact += item.turns[0].is_exact(tokenizer.decode(output, skip_special_tokens=True))
    assert exact >= 9
