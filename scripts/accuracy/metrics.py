"""Numbers from answers and log-probabilities, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` numbers, its standard error and its 95 % interval."""

    mean: float
    se: float
    n: int

    @property
    def low(self) -> float:
        return self.mean - Z_95 * self.se

    @property
    def high(self) -> float:
        return self.mean + Z_95 * self.se


def estimate(numbers: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Mean and standard error; numbers of one cluster (questions about one document) may depend on each other.

    Raises
    ------
    ValueError
        There are no numbers, or not one cluster for each.
    """
    if not len(numbers):
        raise ValueError("an estimate needs at least one number")
    clusters = range(len(numbers)) if clusters is None else clusters
    center = math.fsum(numbers) / len(numbers)
    sums: dict[Hashable, float] = {}
    for number, cluster in zip(numbers, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + number - center
    # Few clusters look too certain without the correction.
    correction = len(sums) / (len(sums) - 1) if len(sums) > 1 else 1.0
    error = math.sqrt(correction * math.fsum(total**2 for total in sums.values())) / len(numbers)
    return Estimate(center, error, len(numbers))


def paired_difference(
    numbers: Sequence[float], others: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """Mean of `numbers` less `others`, item by item."""
    return estimate([float(a) - float(b) for a, b in zip(numbers, others, strict=True)], clusters)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share; unlike a standard error it is not empty where all n agree."""
    center = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


@dataclass(frozen=True)
class NextToken:
    """The likeliest next tokens at one position: `ids` int32 and natural-log `logprobs` float32, in any order."""

    ids: np.ndarray
    logprobs: np.ndarray

    @property
    def top(self) -> int:
        """The likeliest token; among equals, which bf16 logits often are, the lowest id, as argmax has it."""
        return int(self.ids[self.logprobs == self.logprobs.max()].min())


def kl_divergence(reference: NextToken, other: NextToken) -> float:
    """KL(reference || other) in nats, over the tokens that both list and one bucket for all others.

    Exact if both list the whole vocabulary, and otherwise a lower bound, by the data-processing inequality.
    """
    _, mine, theirs = np.intersect1d(reference.ids, other.ids, assume_unique=True, return_indices=True)
    log_p, log_q = reference.logprobs[mine].astype(np.float64), other.logprobs[theirs].astype(np.float64)
    p, q = np.exp(log_p), np.exp(log_q)
    total = float((p * (log_p - log_q)).sum())
    rest_p, rest_q = max(0.0, 1.0 - float(p.sum())), max(0.0, 1.0 - float(q.sum()))
    # Below float32's rounding of the sums the buckets are empty.
    if rest_p > 1e-6:
        total += rest_p * math.log(rest_p / max(rest_q, 1e-6))
    return max(0.0, total)


def token_f1(reply: str, answer: str) -> float:
    """F1 of the bags of words, case and punctuation aside (LongBench's qa_f1_score, SQuAD)."""
    ours, theirs = _words(reply), _words(answer)
    common = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def same_words(reply: str, answer: str) -> bool:
    """Whether both are the same words, case, articles and punctuation aside."""
    return _words(reply) == _words(answer)


def _words(text: str) -> list[str]:
    cleaned = "".join(character if character.isalnum() else " " for character in text.lower())
    return [word for word in cleaned.split() if word not in ("a", "an", "the")]
