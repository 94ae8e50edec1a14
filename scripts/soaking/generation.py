"""Random programs, and smaller ones made from a program.

Not by hypothesis, which draws small programs first and then variants of one: a program takes seconds and needs dozens
of requests to fill a pool, so the few that there is time for have to be large, and unlike each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from recall_tasks import KINDS
from soaking.malformed import MALFORMED
from soaking.programs import QUESTIONS, Document, Excerpt, Fate, Program, Request, Wave

OVERLONG = 800
"""Answer tokens of a request that holds on until the server's own time limit."""

# The pool of the servers has 1,024 slots and prefill chunks have 128: documents of one to five chunks.
_DOCUMENT_TOKENS = (60, 120, 240, 400, 550)
_ANSWER_TOKENS = (1, 8, 24, 24, 60, 120)
# Of requests that come together and want more slots than there are, so that some are retracted.
_CROWD_TOKENS = (100, 160)
_CUT_TOKENS = (0, 1, 5, 40)
_PATIENCE_S = (0.02, 0.2, 0.8)


def make_program(seed: int, number: int, max_waves: int = 5, max_requests: int = 12) -> Program:
    """Trees of conversations: some share prefixes of documents, some continue earlier ones, several from one.

    Parameters
    ----------
    seed, number
        The same program for the same numbers.
    max_waves, max_requests
        Of a program, at least 2, and of a wave, at least 3.
    """
    rng = random.Random(f"program/{seed}/{number}")
    documents = tuple(
        Document(rng.choice(KINDS), rng.randrange(10**6), rng.choice(_DOCUMENT_TOKENS))
        for _ in range(rng.randint(1, 4))
    )
    waves: list[Wave] = []
    answered: list[int] = []
    count = 0
    for index in range(rng.randint(2, max_waves)):
        make = _make_crowded if rng.random() < 0.25 else _make_request
        low = max_requests - 2 if make is _make_crowded else 3
        requests = [make(rng, len(documents), answered) for _ in range(rng.randint(low, max_requests))]
        malformed = rng.sample(sorted(MALFORMED), rng.choice((0, 1, 2)))
        waves.append(Wave(tuple(requests), tuple(malformed), flush=index > 0 and rng.random() < 0.1))
        answered += [count + offset for offset, request in enumerate(requests) if request.fate.kind == "finish"]
        count += len(requests)
    return Program(documents, tuple(waves))


def _make_request(rng: random.Random, num_documents: int, answered: list[int]) -> Request:
    """A request, of a new conversation or after one of the requests ``answered``."""
    source: Excerpt | int = Excerpt(rng.randrange(num_documents), rng.randint(1, 4))
    if answered and rng.random() < 0.5:
        source = rng.choice(answered)
    fate = _make_fate(rng)
    ways = {"finish": ("generate", "stream", "chat"), "timeout": ("generate", "chat")}
    via = rng.choice(ways.get(fate.kind, ("stream",)))
    return Request(
        source,
        question=rng.randrange(QUESTIONS),
        via=via,
        max_new_tokens=OVERLONG if rng.random() < 0.03 else rng.choice(_ANSWER_TOKENS),
        ignore_eos=rng.random() < 0.5,
        fate=fate,
        copies=2 if via == "generate" and rng.random() < 0.2 else 1,
    )


def _make_crowded(rng: random.Random, num_documents: int, answered: list[int]) -> Request:
    """The same, but its answer is long."""
    request = _make_request(rng, num_documents, answered)
    return replace(request, max_new_tokens=rng.choice(_CROWD_TOKENS), ignore_eos=True, copies=1)


def _make_fate(rng: random.Random) -> Fate:
    kind = rng.choices(("finish", "abort", "disconnect", "timeout"), (70, 10, 10, 10))[0]
    if kind == "timeout":
        return Fate(kind, seconds=rng.choice(_PATIENCE_S))
    return Fate(kind, tokens=0 if kind == "finish" else rng.choice(_CUT_TOKENS))


def shrink(program: Program, fails: Callable[[Program], bool], max_tries: int) -> Program:
    """The smallest program that fails, of those that come from ``program`` by leaving parts of it out.

    Parameters
    ----------
    fails
        Runs a program.
    max_tries
        Runs at most.
    """
    tries = 0
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for candidate in smaller(program):
            if tries == max_tries:
                return program
            tries += 1
            if fails(candidate):
                program, is_smaller = candidate, True
                break
    return program


def smaller(program: Program) -> Iterator[Program]:
    """Programs that lack one part, large parts first: a wave, a request and those that continue it, an extra."""
    number = 0
    for wave in program.waves:
        yield from _without(program, set(range(number, number + len(wave.requests))))
        number += len(wave.requests)
    for number in range(len(program.requests())):
        yield from _without(program, {number})
    for index, wave in enumerate(program.waves):
        for plainer in (replace(wave, malformed=()), replace(wave, flush=False)):
            if plainer != wave:
                yield replace(program, waves=(*program.waves[:index], plainer, *program.waves[index + 1 :]))


def _without(program: Program, dropped: set[int]) -> Iterator[Program]:
    """The program without these requests and those that continue them, unless nothing is left."""
    dropped, kept = set(dropped), {}
    for number, request in enumerate(program.requests()):
        if number in dropped or request.source in dropped:
            dropped.add(number)
        else:
            kept[number] = len(kept)
    waves, number = [], 0
    for wave in program.waves:
        requests = []
        for request in wave.requests:
            if number in kept:
                source = kept[request.source] if isinstance(request.source, int) else request.source
                requests.append(replace(request, source=source))
            number += 1
        if requests:
            waves.append(replace(wave, requests=tuple(requests)))
    if waves:
        yield replace(program, waves=tuple(waves))
