"""What two servers said to the same program, and what no server may say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from soaking.execution import Outcome, Transcript
from soaking.programs import Program, codes_in

_FAILED = ("lost", "hung")


class Comparison(NamedTuple):
    """Differences in words, and how many requests could be compared to their end."""

    differences: list[str]
    compared: int


def compare(program: Program, expected: Transcript, got: Transcript) -> Comparison:
    """Each answer must equal the expected one; of an answer that was cut, what there is of it must begin the other.

    Requests that continue one which was cut are asked differently by either server: only their failures count.
    """
    differences, compared, is_asked_alike = failures(got), 0, []
    for number, (request, want, have) in enumerate(
        zip(program.requests(), expected.outcomes, got.outcomes, strict=True)
    ):
        is_asked_alike.append(
            not isinstance(request.source, int)
            or (is_asked_alike[request.source] and _is_answered(request.source, expected, got))
        )
        if not is_asked_alike[number] or want.status in _FAILED or have.status in _FAILED:
            continue
        compared += want.status == have.status != "cut"
        difference = _difference(want, have)
        if difference:
            differences.append(f"request {number} {difference}; {request}")
    for want, have in zip(expected.malformed, got.malformed, strict=True):
        if want.http_status != have.http_status:
            differences.append(f"malformed ({want.prompt}): status {have.http_status} instead of {want.http_status}")
    return Comparison(differences, compared)


def failures(said: Transcript) -> list[str]:
    """Requests that got no answer, malformed ones that got one, and other errors."""
    problems = said.errors + [
        f"request {number} was {outcome.status}: {outcome.detail}"
        for number, outcome in enumerate(said.outcomes)
        if outcome.status in _FAILED
    ]
    for outcome in said.malformed:
        if outcome.status != "refused":
            problems.append(f"malformed ({outcome.prompt}) was {outcome.status}: {outcome.detail[:200]}")
    return problems


def foreign_codes(program: Program, said: Transcript) -> list[str]:
    """Answers with a number that stands in a document, but in nothing that the request was asked with."""
    codes = program.codes()
    problems = []
    for number, outcome in enumerate(said.outcomes):
        foreign = (codes & codes_in(" | ".join(outcome.texts))) - codes_in(outcome.prompt)
        if foreign:
            problems.append(f"request {number} says {sorted(foreign)}, which it was not told")
    return problems


def recall(program: Program, said: Transcript) -> tuple[int, int]:
    """Right answers, and questions that could be answered: the document says it, and the answer was not cut."""
    right = total = 0
    for number, (request, outcome) in enumerate(zip(program.requests(), said.outcomes, strict=True)):
        turn = program.item(number).turns[request.question]
        if outcome.status == "answered" and request.max_new_tokens >= 24 and turn.answer in program.text(number):
            total += 1
            right += turn.is_correct(outcome.texts[0])
    return right, total


def _is_answered(number: int, *transcripts: Transcript) -> bool:
    return all(transcript.outcomes[number].status == "answered" for transcript in transcripts)


def _difference(want: Outcome, have: Outcome) -> str:
    """Empty if there is none."""
    if "cut" in (want.status, have.status):
        for one, other in zip(want.ids or want.texts, have.ids or have.texts, strict=False):
            if _common(one, other) < min(len(one), len(other)):
                return f"begins with {other} instead of {one}"
        return ""
    if want.status != have.status or want.http_status != have.http_status:
        return (
            f"was {have.status} ({have.http_status}) instead of {want.status} ({want.http_status}): {have.detail[:200]}"
        )
    if (want.texts, want.ids) != (have.texts, have.ids):
        place = f", from token {_common(want.ids[0], have.ids[0])} on" if want.ids else ""
        return f"says {have.texts} instead of {want.texts}{place}"
    return ""


def _common(one: Sequence, other: Sequence) -> int:
    """How many items both begin with."""
    return next(
        (place for place, (left, right) in enumerate(zip(one, other, strict=False)) if left != right),
        min(len(one), len(other)),
    )
