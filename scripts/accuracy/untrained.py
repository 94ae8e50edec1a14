"""RULER-like exercises whose form the bundled model was not trained on: variables, common words, copying.

They use the words of `recall_tasks`, so that every word is one token of the bundled tokenizer.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from recall_tasks import ADJECTIVES, GROUPS, NAMES, NOUNS, PLACES, RELATIONS, Relation, count_tokens, filler_document

COPIED_WORDS = 32
COMMON_WORDS = 3
COMMON_COUNT = 12
RARE_COUNT = 2
HOPS = 2


@dataclass(frozen=True)
class Exercise:
    """A prompt, the beginning of the reply that is given, the expected rest and what a right reply contains."""

    prompt: str
    answer: str
    values: tuple[str, ...]
    prefix: str = ""
    max_new_tokens: int = 32


def draw_key(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"


def draw_value(rng: random.Random, relation: Relation) -> str:
    """A value of the relation's kind."""
    kinds = {
        "number": lambda: f"{rng.choice(GROUPS)} {rng.choice(GROUPS)}",
        "name": lambda: rng.choice(NAMES),
        "place": lambda: rng.choice(PLACES),
        "phrase": lambda: draw_key(rng),
    }
    return kinds[relation.value_kind]()


def variable_tracking(rng: random.Random, length: int) -> Exercise:
    """A number under one key, and keys that refer to keys, `HOPS` steps from the number; chains of distraction besides.

    RULER's variable tracking asks for all variables of a chain; here for the number at its end.
    """
    relation = RELATIONS[0]
    statements, question, answer, value = [], "", "", ""
    keys = rng.sample([f"{a} {n}" for a in ADJECTIVES for n in NOUNS], 3 * (HOPS + 1))
    for chain in range(3):
        names = keys[chain * (HOPS + 1) : (chain + 1) * (HOPS + 1)]
        value = draw_value(rng, relation)
        statements.append(relation.statement.format(key=names[0], value=value))
        for known, new in itertools.pairwise(names):
            statements.append(relation.statement.format(key=new, value=f"the code for the {known}"))
        question = relation.question.format(key=names[-1])
        answer = relation.statement.format(key=names[-1], value=value)
    return Exercise(f"{filler_document(statements, rng, length)}\n{question}", answer, (value,))


def common_words(rng: random.Random, length: int) -> Exercise:
    """A list in which `COMMON_WORDS` words stand `COMMON_COUNT` times and all others `RARE_COUNT` times."""
    rare = max(1, (length - COMMON_WORDS * COMMON_COUNT) // RARE_COUNT)
    drawn = rng.sample(sorted({*NOUNS, *ADJECTIVES, *map(str, GROUPS)}), COMMON_WORDS + rare)
    common, others = drawn[:COMMON_WORDS], drawn[COMMON_WORDS:]
    words = common * COMMON_COUNT + others * RARE_COUNT
    rng.shuffle(words)
    answer = " ".join(sorted(common, key=words.index))
    prompt = f"{' '.join(words)}\nWhat are the {COMMON_WORDS} most common words?"
    return Exercise(prompt, answer, tuple(common), max_new_tokens=16)


def copying(rng: random.Random, length: int) -> Exercise:
    """Words to be repeated from the middle of a document, after the first four of them."""
    words = rng.sample([*NOUNS, *ADJECTIVES, *NAMES, *PLACES], COPIED_WORDS)
    passage = " ".join(words)
    document = filler_document([f"{passage}."], rng, max(length, count_tokens(passage) + 1))
    given, rest = " ".join(words[:4]), " " + " ".join(words[4:])
    prompt = f"{document}\nRepeat the words after {given}."
    return Exercise(prompt, rest, (rest.strip(),), prefix=given, max_new_tokens=COPIED_WORDS)
