"""Conversations whose every prompt is known beforehand, so that all servers see the same bytes.

A user asks about a document of their own, after a system prompt that all users share. What a prompt repeats of earlier
answers is written down here and not taken from the server: SGLang's own multi-turn benchmarks go on from the server's
answers, and then two servers that answer differently do not get the same work.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from recall_tasks import Turn, filler_document, make_item

# Tokens of a question, and of an answer as later prompts repeat it, where both are random: about what chats have.
RANDOM_QUESTION, RANDOM_ANSWER = 64, 64


@dataclass(frozen=True)
class Shape:
    """How many conversations, and their sizes in tokens.

    Parameters
    ----------
    system_len, document_len
        Of the system prompt and of each document; where they are text, about as many.
    reply_len
        Generated in each turn, whatever the model says: it does not stop by itself.
    """

    users: int
    turns: int
    system_len: int
    document_len: int
    reply_len: int
    seed: int


@dataclass(frozen=True)
class Request:
    """One turn of one user.

    Parameters
    ----------
    input_ids
        The whole prompt.
    expected
        The question with its answer, or None where there is no right one.
    """

    user: int
    turn: int
    input_ids: tuple[int, ...]
    expected: Turn | None


def make_requests(tokenizer: PreTrainedTokenizerBase, shape: Shape) -> list[Request]:
    """All turns of all users in the order to send them.

    Every user speaks once in each round of turns, each round in an order of its own. The text is that of the recall
    tasks if the model's tokenizer has a chat template, else random ids.
    """
    make = _recall_conversation if tokenizer.chat_template else _random_conversation
    conversations = [list(make(tokenizer, shape, user)) for user in range(shape.users)]
    rng = random.Random(f"rounds/{shape.seed}")
    requests = []
    for turn in range(shape.turns):
        for user in rng.sample(range(shape.users), shape.users):
            input_ids, expected = conversations[user][turn]
            requests.append(Request(user, turn, tuple(input_ids), expected))
    return requests


def _recall_conversation(
    tokenizer: PreTrainedTokenizerBase, shape: Shape, user: int
) -> Iterator[tuple[list[int], Turn]]:
    system = filler_document([], random.Random(f"system/{shape.seed}"), shape.system_len)
    rng = random.Random(f"user/{shape.seed}/{user}")
    item = make_item("multi_turn", rng, shape.document_len, questions=shape.turns)
    item = dataclasses.replace(item, system=system)
    for turn, expected in enumerate(item.turns):
        messages = item.messages(turn)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template has written the special tokens.
        yield tokenizer.encode(text, add_special_tokens=False), expected


def _random_conversation(
    tokenizer: PreTrainedTokenizerBase, shape: Shape, user: int
) -> Iterator[tuple[list[int], None]]:
    def draw(rng: random.Random, count: int) -> list[int]:
        return rng.choices(range(tokenizer.vocab_size), k=count)

    prompt = draw(random.Random(f"system/{shape.seed}"), shape.system_len)
    rng = random.Random(f"user/{shape.seed}/{user}")
    prompt += draw(rng, shape.document_len)
    for _ in range(shape.turns):
        prompt = prompt + draw(rng, RANDOM_QUESTION)
        yield prompt, None
        prompt = prompt + draw(rng, RANDOM_ANSWER)
