"""What one method answered to each question, kept on disk, and the rows that follow from it."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from accuracy.metrics import Estimate, estimate, paired_difference
from accuracy.results import Comparison, Row, Source


@dataclass(frozen=True)
class Label:
    """Which way of storing the cache; the first fields of a `Row`."""

    method: str
    key_ratio: float = 0.0
    restore_bits: int | None = None
    values: str = "bf16"

    def __str__(self) -> str:
        parts = [self.method]
        if self.key_ratio:
            parts.append(f"ratio {self.key_ratio:g}")
        if self.restore_bits is not None:
            parts.append(f"{self.restore_bits} bits")
        if self.values != "bf16":
            parts.append(f"{self.values} values")
        return ", ".join(parts)


DENSE = Label("dense")


@dataclass(frozen=True)
class Outcome:
    """One question's result.

    Parameters
    ----------
    item
        Number of the document.
    right
        1 for an exact match, 0 otherwise; RULER files give the share of answers found.
    token_hits
        Per token of the expected answer: whether it was the likeliest after those before it.
    agrees
        Per token: whether the likeliest one is also the dense cache's.
    kl
        Per token: divergence in nats from the dense cache's distribution.
    f1
        For LongBench files.
    """

    item: int
    right: float
    token_hits: tuple[bool, ...] = ()
    agrees: tuple[bool, ...] = ()
    kl: tuple[float, ...] = ()
    f1: float | None = None


class OutcomeStore:
    """Outcomes of one source, one file per method, task and length, so that a run stopped in between goes on."""

    def __init__(self, folder: Path, source: Source):
        self.folder = folder / source
        self.source = source

    def _path(self, label: Label, task: str, length: int) -> Path:
        slug = re.sub(r"[^a-z0-9.]+", "-", str(label).lower()).strip("-")
        return self.folder / slug / f"{task}-{length}.json"

    def load(self, label: Label, task: str, length: int) -> list[Outcome] | None:
        path = self._path(label, task, length)
        if not path.exists():
            return None
        return [
            Outcome(**{name: tuple(value) if isinstance(value, list) else value for name, value in record.items()})
            for record in orjson.loads(path.read_bytes())
        ]

    def save(self, label: Label, task: str, length: int, outcomes: list[Outcome]) -> None:
        path = self._path(label, task, length)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(orjson.dumps([asdict(outcome) for outcome in outcomes]))


def make_row(label: Label, size: float, task: str, length: int, outcomes: list[Outcome], source: Source) -> Row:
    """The row of `Row`'s fields."""
    right = estimate([outcome.right for outcome in outcomes], [outcome.item for outcome in outcomes])
    kl = per_token(outcomes, "kl")
    return Row(
        **asdict(label),
        bytes_per_token_head=round(size, 2),
        task=task,
        length=length,
        n=len(outcomes),
        exact_match=round(right.mean, 4),
        exact_match_se=round(right.se, 4),
        kl=None if kl is None else round(kl.mean, 6),
        source=source,
    )


def make_comparisons(
    label: Label, task: str, length: int, outcomes: list[Outcome], dense: list[Outcome] | None, source: Source
) -> list[Comparison]:
    """What `Row` has no place for: the paired difference in exact match, and token-level numbers with intervals.

    Without outcomes of the dense cache there is no difference.
    """
    items = [outcome.item for outcome in outcomes]
    right = [outcome.right for outcome in outcomes]
    found: dict[tuple[str, str], Estimate | None] = {
        ("exact_match", "dense"): paired_difference(right, [o.right for o in dense], items) if dense else None,
        ("token_accuracy", "expected answer"): per_token(outcomes, "token_hits"),
        ("top1_agreement", "dense"): per_token(outcomes, "agrees"),
        ("kl", "dense"): per_token(outcomes, "kl"),
    }
    if all(outcome.f1 is not None for outcome in outcomes):
        found["f1", "expected answer"] = estimate([outcome.f1 for outcome in outcomes], items)
    return [
        comparison(label, task, length, metric, against, value, source)
        for (metric, against), value in found.items()
        if value is not None
    ]


def comparison(
    label: Label, task: str, length: int, metric: str, against: str, value: Estimate, source: Source
) -> Comparison:
    numbers = (round(number, 6) for number in (value.mean, value.low, value.high))
    return Comparison(**asdict(label), task=task, length=length, metric=metric, against=against, n=value.n,
                      **dict(zip(("mean", "low", "high"), numbers, strict=True)), source=source)  # fmt: skip


def per_token(outcomes: list[Outcome], name: str) -> Estimate | None:
    """Mean over all tokens of all questions, documents as clusters; None without token-level numbers."""
    numbers = [(float(number), outcome.item) for outcome in outcomes for number in getattr(outcome, name)]
    return estimate(*map(list, zip(*numbers, strict=True))) if numbers else None
