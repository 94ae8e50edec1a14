"""Recall tasks: English-like documents with facts in them, and questions whose answers are those facts.

Everything is generated from a `random.Random`, so an item is a function of its seed and nothing is
downloaded. The bundled recall model is trained on these items, and the demo, the tests and the accuracy
evaluation ask it new ones. Keys and values are drawn independently of each other, so an answer can only come
from the context.

An item renders in two forms with the same content:

* chat (`RecallItem.messages`): the document and the first question are the first user message, every further
  question is a turn of its own;
* plain (`RecallItem.plain_prompt`): the document, then ``Question: ...`` and ``Answer:`` on lines of their
  own, for `/generate` and for frontend programs.

Every word, number and punctuation mark below is one token of the bundled tokenizer (`vocabulary` lists them),
so `count_tokens` sizes a document without loading it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["single_needle", "multi_needle", "kv_list", "multi_turn"]
ValueKind = Literal["number", "name", "place", "phrase"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


ADJECTIVES = _words(
    "amber ancient black blue bold brave bright brown calm clever cold copper crimson curious dark "
    "distant dusty early empty faded gentle golden grand gray green happy heavy hidden hollow humble "
    "icy ivory jolly kind late lonely loud lucky marble mighty modern narrow noble orange pale patient "
    "pink plain proud purple quick quiet rapid red royal rusty scarlet secret shiny silent silver "
    "simple small smooth solar steady stone sunny swift tall tiny velvet violet warm white wild wise "
    "wooden yellow young"
)
NOUNS = _words(
    "anchor apple arrow badger barn basket beacon bear bell boat bottle bridge cabin camel candle "
    "canyon castle cedar chapel cloud comet crane crown desert dolphin dragon drum eagle engine falcon "
    "farm feather ferry fox garden gate glacier goose guitar hammer harbor hawk hill horse island "
    "jacket kettle key kite ladder lake lantern library lion lizard mirror monkey mountain needle oak "
    "ocean orchard otter owl palace panda parrot pebble piano pigeon planet pony rabbit raven ribbon "
    "river robot rocket saddle salmon shark ship shore spider statue storm table temple tiger tower "
    "train tree tunnel turtle valley village violin wagon walnut whale window wolf zebra"
)
NAMES = _words(
    "Ada Adam Alice Amir Anna Anton Bella Boris Bruno Carla Carlos Chen Clara Daniel Diana Elena Emil "
    "Emma Eva Felix Fiona Frank Gina Grace Hana Hugo Ida Igor Irene Ivan Jack Jane Jonas Julia Karl "
    "Kenji Laura Leo Lina Lucas Maria Marta Max Mia Milo Nadia Nina Noah Nora Olga Omar Oscar Paul "
    "Petra Rosa Ruth Sam Sara Simon Sofia Tara Tom Vera Victor Yara Zoe"
)
PLACES = _words(
    "Athens Berlin Bogota Boston Cairo Chicago Dakar Delhi Denver Dublin Geneva Hanoi Havana Helsinki "
    "Istanbul Jakarta Kyoto Lagos Lima Lisbon London Madrid Manila Milan Montreal Moscow Munich Nairobi "
    "Naples Oslo Paris Prague Quito Riga Rome Santiago Seoul Seville Sydney Tokyo Toronto Tunis Vienna "
    "Warsaw Zurich"
)
PEOPLE = _words(
    "baker captain doctor driver farmer fisherman gardener king merchant miller nurse painter pilot "
    "poet queen sailor scientist singer soldier student tailor teacher traveler writer"
)
ACTIONS = _words(
    "admired bought borrowed built carried cleaned described discovered drew examined followed forgot "
    "found guarded ignored inspected left lost mentioned moved noticed opened painted passed "
    "photographed praised remembered repaired saw sketched sold studied visited watched"
)
ADVERBS = _words("again alone calmly carefully eagerly gladly often once proudly quickly quietly rarely slowly")
TIMES = _phrases(
    "at dawn|at dusk|at midnight|at noon|before lunch|after dinner|in spring|in summer|in autumn|in winter|"
    "last week|last year|on Monday|on Tuesday|on Wednesday|on Thursday|on Friday|on Saturday|on Sunday|"
    "every morning|every evening|during the festival|after the rain|before the meeting"
)
SPOTS = _phrases("near the|behind the|beside the|under the|above the|across from the|close to the|not far from the")
GROUPS = range(100, 1000)
"""Numbers are written as two of these three-digit groups (``412 907``), each one token."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer the questions about the text.",
    "You answer from the text and from nothing else.",
    "Read the text carefully and answer every question.",
)


FILLERS = (
    "The {adjective} {person} {action} the {noun} {time}.",
    "{name} {action} the {adjective} {noun} {spot} {other_noun}.",
    "{name} and {other_name} traveled from {place} to {other_place} {time}.",
    "It was {adjective} and quiet in {place} {time}.",
    "The {adjective} {noun} {spot} {other_noun} was old.",
    "{name} said that the {person} {adverb} {action} the {noun}.",
    "Nobody in {place} {action} the {adjective} {noun}.",
    "A {person} from {place} {adverb} {action} the {noun} {time}.",
    "Everyone knows that {name} {action} the {noun} in {place}.",
    "The {person} and the {adjective} {noun} were seen {spot} {other_noun} {time}.",
    "{name} {adverb} {action} the {noun}, and {other_name} {action} the {other_noun}.",
)


@dataclass(frozen=True)
class Relation:
    """One form of fact: how it is stated, how it is asked for, and what its values are."""

    statement: str
    question: str
    value_kind: ValueKind


RELATIONS = (
    Relation("The code for the {key} is {value}.", "What is the code for the {key}?", "number"),
    Relation("The price of the {key} is {value}.", "What is the price of the {key}?", "number"),
    Relation("The keeper of the {key} is {value}.", "Who is the keeper of the {key}?", "name"),
    Relation("The home of the {key} is {value}.", "Where is the home of the {key}?", "place"),
    Relation("The password of the {key} is {value}.", "What is the password of the {key}?", "phrase"),
)
LIST_ENTRY = Relation("Item {key}: {value}.", "What is the value of item {key}?", "number")


@dataclass(frozen=True)
class Fact:
    """A value bound to a key, for example the code 412 907 to the red falcon."""

    relation: Relation
    key: str
    value: str

    @property
    def statement(self) -> str:
        return self.relation.statement.format(key=self.key, value=self.value)

    @property
    def question(self) -> str:
        return self.relation.question.format(key=self.key)


@dataclass(frozen=True)
class Turn:
    """One question, the sentence the model should reply, and the part of that sentence which is the fact."""

    question: str
    answer: str
    value: str

    def is_exact(self, reply: str) -> bool:
        """Whether `reply` is the expected sentence and nothing else."""
        return reply.strip() == self.answer

    def is_correct(self, reply: str) -> bool:
        """Whether the first line of `reply` holds the value, however the rest of it is phrased."""
        return self.value in reply.strip().partition("\n")[0]


@dataclass(frozen=True)
class RecallItem:
    """A document and the questions asked about it, in order."""

    kind: Kind
    document: str
    turns: tuple[Turn, ...]
    system: str | None = None

    def messages(self, turn: int = 0) -> list[dict[str, str]]:
        """Chat messages that end with the question of `turn`; earlier turns carry their expected answers."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for index, past in enumerate(self.turns[:turn]):
            messages.append({"role": "user", "content": self._user_text(index)})
            messages.append({"role": "assistant", "content": past.answer})
        messages.append({"role": "user", "content": self._user_text(turn)})
        return messages

    def plain_prompt(self, turn: int = 0) -> str:
        """Text that ends with ``Answer:`` for the question of `turn`; the reply begins with a space."""
        return "".join(text for text, _ in self.plain_segments(turn))

    def plain_segments(self, turn: int) -> Iterator[tuple[str, bool]]:
        """The pieces of `plain_prompt` with a flag that tells which of them are answers."""
        yield self.document, False
        for past in self.turns[:turn]:
            yield f"\nQuestion: {past.question}\nAnswer:", False
            yield f" {past.answer}", True
        yield f"\nQuestion: {self.turns[turn].question}\nAnswer:", False

    def _user_text(self, turn: int) -> str:
        question = self.turns[turn].question
        return f"{self.document}\n{question}" if turn == 0 else question


def make_item(
    kind: Kind,
    rng: random.Random,
    target_tokens: int,
    *,
    facts: int | None = None,
    questions: int | None = None,
    unfamiliar: bool = False,
) -> RecallItem:
    """Draws one item whose document is close to, and never over, `target_tokens` tokens.

    Parameters
    ----------
    kind
        ``single_needle`` hides one fact in filler; ``multi_needle`` several facts of one form under
        different keys; ``kv_list`` is a list of entries with some filler around it; ``multi_turn`` mixes
        forms, also under one key, and asks several questions, later ones possibly again.
    rng
        Source of all randomness.
    target_tokens
        Size of the document by `count_tokens`; questions and role markers come on top (about 30 a turn).
    facts, questions
        How many facts the document holds and how many questions are asked; drawn by kind if None.
    unfamiliar
        Make keys and values up from letters and digits instead of drawing them from the lists: they stand
        for a user's own words. They take several tokens each, so the document is longer than `count_tokens`
        says.
    """
    bound = _draw_facts(kind, rng, facts or _draw_fact_count(kind, rng, target_tokens), unfamiliar)
    statements = [fact.statement for fact in bound]
    make_document = _list_document if kind == "kv_list" else filler_document
    return RecallItem(
        kind=kind,
        document=make_document(statements, rng, target_tokens),
        turns=tuple(_draw_turns(kind, bound, rng, questions or _draw_question_count(kind, rng))),
        system=rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.5 else None,
    )


def make_items(kind: Kind, seed: int, count: int, target_tokens: int, **options: int | bool | None) -> list[RecallItem]:
    """`count` items of one kind, each from its own generator so that item i does not depend on `count`."""
    return [
        make_item(kind, random.Random(f"{kind}/{seed}/{index}"), target_tokens, **options) for index in range(count)
    ]


def count_tokens(text: str) -> int:
    """Tokens of generated text: words, numbers, punctuation marks and newlines."""
    return len(re.findall(r"\w+|[^\w\s]|\n", text))


def vocabulary() -> list[str]:
    """Every pre-token that generated text can contain, as it stands there (mostly with a leading space)."""
    templates = [*FILLERS, *SYSTEM_PROMPTS, *SPOTS, *TIMES, "\nQuestion: ?\nAnswer:"]
    for relation in (*RELATIONS, LIST_ENTRY):
        templates += [relation.statement, relation.question]
    fixed = [re.sub(r"\{\w+\}", "", template) for template in templates]
    pieces = {piece for text in fixed for piece in re.findall(r" ?\w+|[^\w\s]|\n", text)}
    lists = (ADJECTIVES, NOUNS, NAMES, PLACES, PEOPLE, ACTIONS, ADVERBS, map(str, GROUPS))
    words = {word for group in lists for word in group} | {piece.strip() for piece in pieces if piece.strip().isalpha()}
    return sorted(pieces | {f" {word}" for word in words} | set(NAMES))


def _draw_fact_count(kind: Kind, rng: random.Random, target_tokens: int) -> int:
    """Facts per document, fewer in short ones so that filler or other entries remain around them."""
    if kind == "single_needle":
        return 1
    low, high, tokens_each = {"multi_needle": (3, 12, 24), "kv_list": (6, 40, 16), "multi_turn": (3, 10, 24)}[kind]
    return rng.randint(low, max(low, min(high, target_tokens // tokens_each)))


def _draw_question_count(kind: Kind, rng: random.Random) -> int:
    return rng.randint(3, 5) if kind == "multi_turn" else 1


def _draw_facts(kind: Kind, rng: random.Random, count: int, unfamiliar: bool) -> list[Fact]:
    """Facts of one relation under different keys; `multi_turn` mixes relations, also under one key."""
    shared = LIST_ENTRY if kind == "kv_list" else rng.choice(RELATIONS)
    bound: dict[tuple[Relation, str], Fact] = {}
    while len(bound) < count:
        relation, key = shared, _draw_key(rng, unfamiliar)
        if kind == "multi_turn":
            relation = rng.choice(RELATIONS)
            if bound and rng.random() < 0.25:
                key = rng.choice(list(bound))[1]
        bound.setdefault((relation, key), Fact(relation, key, _draw_value(relation.value_kind, rng, unfamiliar)))
    return list(bound.values())


def _draw_key(rng: random.Random, unfamiliar: bool) -> str:
    if not unfamiliar:
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    made_up = _made_up_word(rng)
    return rng.choice((made_up, f"{rng.choice(ADJECTIVES)} {made_up}"))


def _draw_value(kind: ValueKind, rng: random.Random, unfamiliar: bool) -> str:
    if kind == "number":
        return str(rng.randrange(10, 10**5)) if unfamiliar else f"{rng.choice(GROUPS)} {rng.choice(GROUPS)}"
    if unfamiliar:
        return _made_up_word(rng).capitalize()
    if kind == "phrase":
        return f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    return rng.choice(NAMES if kind == "name" else PLACES)


def _made_up_word(rng: random.Random) -> str:
    syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
    return "".join(syllables) + rng.choice(("", "l", "n", "r", "s", "t"))


def _draw_turns(kind: Kind, facts: list[Fact], rng: random.Random, count: int) -> Iterator[Turn]:
    """Questions about different facts while there are any; `multi_turn` also comes back to earlier ones."""
    fresh = rng.sample(facts, len(facts))
    asked: list[Fact] = []
    for _ in range(count):
        repeat = not fresh or (kind == "multi_turn" and len(asked) > 1 and rng.random() < 0.3)
        fact = rng.choice(asked) if repeat else fresh.pop()
        asked.append(fact)
        yield Turn(fact.question, fact.statement, fact.value)


def _filler_sentence(rng: random.Random) -> str:
    return rng.choice(FILLERS).format(
        adjective=rng.choice(ADJECTIVES),
        noun=rng.choice(NOUNS),
        other_noun=rng.choice(NOUNS),
        name=rng.choice(NAMES),
        other_name=rng.choice(NAMES),
        place=rng.choice(PLACES),
        other_place=rng.choice(PLACES),
        person=rng.choice(PEOPLE),
        action=rng.choice(ACTIONS),
        adverb=rng.choice(ADVERBS),
        time=rng.choice(TIMES),
        spot=rng.choice(SPOTS),
    )


def _filler_sentences(rng: random.Random, target_tokens: int) -> list[str]:
    """As many sentences as fit into `target_tokens`."""
    sentences: list[str] = []
    while True:
        sentence = _filler_sentence(rng)
        target_tokens -= count_tokens(sentence)
        if target_tokens < 0:
            return sentences
        sentences.append(sentence)


def filler_document(statements: list[str], rng: random.Random, target_tokens: int) -> str:
    """Filler with the statements at random places, as one paragraph."""
    sentences = _filler_sentences(rng, target_tokens - sum(map(count_tokens, statements)))
    for statement in statements:
        sentences.insert(rng.randint(0, len(sentences)), statement)
    return " ".join(sentences)


def _list_document(entries: list[str], rng: random.Random, target_tokens: int) -> str:
    """A block of entries, one a line, with a paragraph of filler before and after it."""
    tokens_of_entries = sum(count_tokens(entry) + 1 for entry in entries)
    sentences = _filler_sentences(rng, target_tokens - tokens_of_entries - 1)
    split = rng.randint(0, len(sentences))
    lines = [" ".join(sentences[:split]), *entries, " ".join(sentences[split:])]
    return "\n".join(line for line in lines if line)
