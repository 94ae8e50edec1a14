"""Items: from their seed alone, of the length asked for, with an answer that follows from the document."""

import re

import pytest

from accuracy.tasks import TASKS
from accuracy.untrained import COMMON_WORDS, COPIED_WORDS
from recall_tasks import count_tokens

ASKED = [name for name in TASKS if name != "continuation"]


@pytest.mark.parametrize("name", TASKS)
def test_items_depend_on_nothing_but_their_seed(name):
    make = TASKS[name].make
    assert make(3, 2, 400) == make(3, 4, 400)[:2]
    assert make(3, 2, 400) != make(4, 2, 400)


@pytest.mark.parametrize("name", TASKS)
def test_documents_have_the_length_asked_for(name):
    for item in TASKS[name].make(0, 3, 700):
        question = item.questions[0]
        text = question.complete or question.messages[-1]["content"]
        assert 600 < count_tokens(text) < 750


@pytest.mark.parametrize("name", ASKED)
def test_the_expected_answer_scores(name):
    for item in TASKS[name].make(0, 3, 400):
        for question in item.questions:
            assert question.score(question.prefix + question.answer) == 1
            assert question.score("I do not know.") == 0


def test_multi_value_asks_for_three_values_of_one_key():
    for item in TASKS["multi_value"].make(0, 5, 300):
        keys = {re.search(r"(?:of|for) the (\w+ \w+)\?", q.messages[-1]["content"])[1] for q in item.questions}
        assert len(item.questions) == 3 and len(keys) == 1
        assert len({question.values for question in item.questions}) == 3


def test_variables_are_two_steps_from_their_number():
    for item in TASKS["variable_tracking"].make(0, 5, 400):
        (question,) = item.questions
        document, asked = question.messages[0]["content"].rsplit("\n", 1)
        key = re.search(r"the code for the (.*)\?", asked)[1]
        for _ in range(2):
            key = re.search(rf"The code for the {key} is the code for the (\w+ \w+)\.", document)[1]
        assert f"The code for the {key} is {question.values[0]}." in document


def test_common_words_are_the_most_common_ones():
    for item in TASKS["common_words"].make(0, 5, 600):
        (question,) = item.questions
        words = question.messages[0]["content"].partition("\n")[0].split()
        by_count = sorted(set(words), key=lambda word: -words.count(word))
        assert set(by_count[:COMMON_WORDS]) == set(question.values)
        assert words.count(by_count[COMMON_WORDS]) < words.count(by_count[COMMON_WORDS - 1])


def test_copied_words_stand_in_the_document():
    for item in TASKS["copying"].make(0, 5, 600):
        (question,) = item.questions
        passage = question.prefix + question.answer
        assert len(passage.split()) == COPIED_WORDS
        assert question.messages[0]["content"].count(f"{passage}.") == 1


def test_own_history_comes_back_to_earlier_questions():
    (item,) = TASKS["own_history"].make(0, 1, 800)
    asked = [question.messages[-1]["content"].rsplit("\n", 1)[-1] for question in item.questions]
    assert len(asked) == 12 and len(set(asked)) < 12
