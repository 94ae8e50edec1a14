"""Programs: what clients do to a server, as data that can be written down and run again."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

from recall_tasks import Kind, RecallItem, make_item

Via = Literal["generate", "stream", "chat"]
FateKind = Literal["finish", "abort", "disconnect", "timeout"]
QUESTIONS = 4
"""Questions that a document is asked, by number."""

_CODE = re.compile(r"\b\d{3} \d{3}\b")


@dataclass(frozen=True)
class Document:
    """A recall task of about ``tokens`` tokens, a function of these fields."""

    kind: Kind
    seed: int
    tokens: int


@dataclass(frozen=True)
class Excerpt:
    """The first ``quarters`` of four of the program's document number ``document``: excerpts of one share prefixes."""

    document: int
    quarters: int


@dataclass(frozen=True)
class Fate:
    """How a request ends.

    Parameters
    ----------
    kind
        ``finish``: with its answer; ``abort``: by ``/abort_request``; ``disconnect``: its client closes the stream;
        ``timeout``: its client waits no longer.
    tokens
        Answer tokens that an aborted or disconnected request reads before.
    seconds
        How long the client of a ``timeout`` waits.
    """

    kind: FateKind = "finish"
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Request:
    """One greedy request.

    Parameters
    ----------
    source
        The excerpt that it is about, or the number of the request whose conversation it continues, from an earlier
        wave. Requests are numbered through all waves.
    question
        Which of the document's questions it asks.
    via
        ``/generate`` at once or as a stream, or ``/v1/chat/completions``.
    max_new_tokens, ignore_eos, fate
        When it ends.
    copies
        ``n``, of ``generate`` only.

    Raises
    ------
    ValueError
        Aborts and disconnects that are no streams, streams with copies.
    """

    source: Excerpt | int
    question: int
    via: Via
    max_new_tokens: int
    ignore_eos: bool = False
    fate: Fate = Fate()
    copies: int = 1

    def __post_init__(self):
        if self.fate.kind in ("abort", "disconnect") and self.via != "stream":
            raise ValueError(f"fate={self.fate.kind} needs via=stream, got via={self.via}")
        if self.copies > 1 and self.via != "generate":
            raise ValueError(f"copies={self.copies} needs via=generate, got via={self.via}")


@dataclass(frozen=True)
class Wave:
    """Requests sent at once, beside malformed ones (names in `malformed.MALFORMED`).

    With ``flush`` the server's radix tree is emptied before.
    """

    requests: tuple[Request, ...]
    malformed: tuple[str, ...] = ()
    flush: bool = False


@dataclass(frozen=True)
class Program:
    """Waves, one after the other."""

    documents: tuple[Document, ...]
    waves: tuple[Wave, ...]

    def requests(self) -> list[Request]:
        """All of them, in the order of their numbers."""
        return [request for wave in self.waves for request in wave.requests]

    def excerpt(self, number: int) -> Excerpt:
        """What the conversation of a request is about."""
        source = self.requests()[number].source
        return source if isinstance(source, Excerpt) else self.excerpt(source)

    def item(self, number: int) -> RecallItem:
        """The recall task that a request asks about."""
        return _item(self.documents[self.excerpt(number).document])

    def text(self, number: int) -> str:
        """The part of its document that a request has."""
        return _beginning(self.item(number).document, self.excerpt(number).quarters)

    def question(self, number: int) -> str:
        """What a request asks."""
        return self.item(number).turns[self.requests()[number].question].question

    def codes(self) -> set[str]:
        """Every number of six digits in any document: what only those may say that were told."""
        return {code for document in self.documents for code in codes_in(_item(document).document)}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Program:
        """The inverse of `to_json`."""
        value = json.loads(text)
        documents = tuple(Document(**document) for document in value["documents"])
        return cls(documents, tuple(_waves(value["waves"])))


def codes_in(text: str) -> set[str]:
    """Numbers as documents have them: two groups of three digits."""
    return set(_CODE.findall(text))


def _waves(values: list[dict[str, Any]]) -> Iterator[Wave]:
    for wave in values:
        requests = tuple(_request(**request) for request in wave["requests"])
        yield Wave(requests, tuple(wave["malformed"]), wave["flush"])


def _request(source: dict[str, int] | int, fate: dict[str, Any], **fields: Any) -> Request:
    return Request(source=source if isinstance(source, int) else Excerpt(**source), fate=Fate(**fate), **fields)


@cache
def _item(document: Document) -> RecallItem:
    rng = random.Random(f"soak/{document.seed}")
    return make_item(document.kind, rng, document.tokens, questions=QUESTIONS)


def _beginning(text: str, quarters: int) -> str:
    """Up to the last word that fits."""
    return text if quarters == 4 else text[: text.rfind(" ", 0, len(text) * quarters // 4)]
