"""Items from JSONL files on disk, in the formats of LongBench (arXiv 2308.14508) and RULER (arXiv 2404.06654)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from accuracy import metrics

DEFAULT_LONGBENCH_PROMPT = "{context}\n\n{input}"
RULER_MAX_NEW_TOKENS = 128
LONGBENCH_MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Example:
    """One line of a file.

    Parameters
    ----------
    prompt
        The whole user message.
    answers
        LongBench: alternatives, one of which is right. RULER: all of them are asked for.
    all_answers
        Which of the two.
    prefix
        Beginning of the reply that the model is given.
    max_new_tokens
        Length of the reply.
    """

    prompt: str
    answers: tuple[str, ...]
    all_answers: bool
    prefix: str = ""
    max_new_tokens: int = LONGBENCH_MAX_NEW_TOKENS

    def exact_match(self, reply: str) -> float:
        """RULER's string_match_all, the share of answers found; for LongBench, 1 if the reply is an answer."""
        if self.all_answers:
            return sum(answer.lower() in reply.lower() for answer in self.answers) / len(self.answers)
        first_line = reply.strip().partition("\n")[0]
        return float(any(metrics.same_words(first_line, answer) for answer in self.answers))

    def f1(self, reply: str) -> float:
        """LongBench's qa_f1_score: the best over the answers."""
        return max(metrics.token_f1(reply.strip().partition("\n")[0], answer) for answer in self.answers)


def load_examples(
    path: Path, *, longbench_prompt: str = DEFAULT_LONGBENCH_PROMPT, limit: int | None = None
) -> list[Example]:
    """The examples of a JSONL file; each line is recognised by its fields.

    LongBench has ``context``, ``input`` and ``answers``; RULER has ``input`` and ``outputs``, and in newer files
    ``answer_prefix``. `longbench_prompt` is LongBench's own template for the data set (``dataset2prompt.json``).

    Raises
    ------
    ValueError
        A line is not JSON or fits neither format; the message names file, line and fields.
    """
    examples = []
    for number, record in _records(path):
        if limit is not None and len(examples) == limit:
            break
        examples.append(_example(record, f"{path}:{number}", longbench_prompt))
    if not examples:
        raise ValueError(f"{path}: the file has no examples")
    return examples


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error


def _example(record: Any, where: str, longbench_prompt: str) -> Example:
    names = set(record) if isinstance(record, dict) else set()
    if {"context", "input", "answers"} <= names:
        prompt = longbench_prompt.replace("{context}", record["context"]).replace("{input}", record["input"])
        answers, all_answers, prefix, length = record["answers"], False, "", LONGBENCH_MAX_NEW_TOKENS
    elif {"input", "outputs"} <= names:
        prompt, answers, all_answers = record["input"], record["outputs"], True
        prefix, length = record.get("answer_prefix", ""), RULER_MAX_NEW_TOKENS
    else:
        raise ValueError(
            f"{where}: neither LongBench (context, input, answers) nor RULER (input, outputs): has {sorted(names)}"
        )
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: answers must be a list of at least one string, got {answers!r}")
    return Example(prompt, tuple(answers), all_answers, prefix, length)
