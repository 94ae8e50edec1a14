"""The loaders on small files in the formats of LongBench and RULER."""

import json
from pathlib import Path

import pytest

from accuracy.jsonl import load_examples
from accuracy.tasks import file_task

FILES = Path(__file__).parent / "files"


def write(path, *records):
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return path


def test_longbench():
    first, second = load_examples(FILES / "longbench_qa.jsonl")
    assert first.prompt.startswith("The lighthouse of Orla") and first.prompt.endswith("Who keeps the lighthouse?")
    assert first.exact_match("Marta Olsen.\nQuestion: more") == 1 and first.exact_match("Marta and Olsen") == 0
    assert second.exact_match("in 1911") == 1 and second.f1("It was in 1911") == pytest.approx(2 * 2 / (4 + 2))


def test_longbench_prompt_template():
    template = "Read: {context}\nQ: {input}\nA:"
    example = load_examples(FILES / "longbench_qa.jsonl", longbench_prompt=template)[0]
    assert example.prompt.startswith("Read: The lighthouse") and example.prompt.endswith(
        "Q: Who keeps the lighthouse?\nA:"
    )


def test_ruler_scores_the_share_of_answers_found():
    needles, variables = load_examples(FILES / "ruler.jsonl")
    assert needles.exact_match("They are 6812 and 9034.") == 1 and needles.exact_match("It is 6812.") == 0.5
    assert needles.prefix.endswith("are") and variables.prefix == ""
    assert variables.exact_match("vab QXZ") == 1


def test_limit():
    assert len(load_examples(FILES / "ruler.jsonl", limit=1)) == 1


def test_blank_lines_are_skipped(tmp_path):
    record = {"input": "a", "outputs": ["b"]}
    assert len(load_examples(write(tmp_path / "x.jsonl", record, "", record))) == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"x.jsonl:2: not JSON"),
        ({"question": "a"}, r"x.jsonl:2: neither LongBench .* nor RULER .*'question'"),
        ([1], r"x.jsonl:2: neither"),
        ({"input": "a", "outputs": []}, r"x.jsonl:2: answers must be a list of at least one string"),
        ({"input": "a", "outputs": "b"}, r"x.jsonl:2: answers must be a list"),
    ],
    ids=["not-json", "other-fields", "not-an-object", "no-answers", "answers-not-a-list"],
)
def test_bad_lines_are_named(tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        load_examples(write(tmp_path / "x.jsonl", {"input": "a", "outputs": ["b"]}, record))


def test_an_empty_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no examples"):
        load_examples(write(tmp_path / "x.jsonl", ""))


def test_a_file_is_a_task():
    task = file_task(FILES / "longbench_qa.jsonl")
    item, _ = task.make(seed=0, count=10, length=0)
    assert task.name == "longbench_qa" and item.questions[0].score("Marta Olsen") == 1
    assert item.questions[0].f1("Marta Olsen") == 1
    assert file_task(FILES / "ruler.jsonl").make(0, 1, 0)[0].questions[0].f1("6812") is None
