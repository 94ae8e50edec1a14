"""Exact match of the recall model's answers, by kind of task, form of prompt and length of document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from recall_tasks import KINDS, Kind, RecallItem, make_items

from .batches import encode_item

EVALUATION_SEED = 20_000
"""Training seeds its items as ``seed/step``, so no evaluation item was trained on."""


@dataclass(frozen=True)
class Task:
    """A row of the table: a kind of item, with words from the generator's lists or made-up ones."""

    name: str
    kind: Kind
    unfamiliar: bool = False


TASKS = (*(Task(kind, kind) for kind in KINDS), Task("single_needle, made-up words", "single_needle", unfamiliar=True))


@dataclass(frozen=True)
class Score:
    """Right answers and questions of one cell, apart for the first question about a document and later ones."""

    task: Task
    form: str
    length: int
    first: tuple[int, int]
    follow_up: tuple[int, int]

    @property
    def exact_match(self) -> float:
        return (self.first[0] + self.follow_up[0]) / (self.first[1] + self.follow_up[1])


def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, lengths: Iterable[int], items: int
) -> Iterator[Score]:
    """Scores `items` items per task, form and length, and yields each cell as soon as it is known."""
    for length in lengths:
        for task in TASKS:
            examples = make_items(task.kind, EVALUATION_SEED, items, length, unfamiliar=task.unfamiliar)
            for form in ("chat", "plain"):
                results = [exact_answers(model, tokenizer, item, chat=form == "chat") for item in examples]
                first = [result[0] for result in results]
                follow_up = [right for result in results for right in result[1:]]
                yield Score(task, form, length, (sum(first), len(first)), (sum(follow_up), len(follow_up)))


@torch.no_grad()
def exact_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, item: RecallItem, chat: bool
) -> list[bool]:
    """For each turn, whether greedy decoding gives the whole answer, with the right answers to earlier turns.

    One forward pass is enough: greedy decoding gives the answer exactly if every one of its tokens is the most
    likely one after those before it.
    """
    ids, marks = encode_item(tokenizer, item, chat)
    tokens = torch.tensor([ids])
    logits = model(tokens, use_cache=False).logits
    right = [False, *(logits[0, :-1].argmax(-1) == tokens[0, 1:]).tolist()]
    turns = groupby(zip(marks, right, strict=True), key=lambda pair: pair[0])
    return [all(hit for _, hit in answer) for is_answer, answer in turns if is_answer]


def markdown_table(scores: list[Score]) -> str:
    """One row per kind and form, one column per length, with the number of questions behind each figure."""
    lengths = sorted({score.length for score in scores})
    lines = [
        "| task | form | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |",
        "|---|---|" + "---|" * len(lengths),
    ]
    for task in TASKS:
        for form in ("chat", "plain"):
            cells = {score.length: score for score in scores if (score.task, score.form) == (task, form)}
            for label, part in (("", "first"), (", follow-up turns", "follow_up")):
                counts = [getattr(cells[length], part) for length in lengths]
                if all(total for _, total in counts):
                    shares = " | ".join(f"{right / total:.3f} ({total})" for right, total in counts)
                    lines.append(f"| {task.name}{label} | {form} | {shares} |")
    return "\n".join(lines)
