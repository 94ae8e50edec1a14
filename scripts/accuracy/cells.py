"""What stands in a cell of the report, and tables as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from accuracy.metrics import Z_95, Estimate
from accuracy.outcomes import DENSE, Label
from accuracy.results import Comparison, Row

TEXT_COLUMNS = ("method", "cache", "task", "prefix", "against", "values")


def pool(parts: Sequence[Comparison | None]) -> Estimate | None:
    """Mean over all questions (or tokens) of several cells, which are independent of each other."""
    if not parts or None in parts:
        return None
    n = sum(part.n for part in parts)
    variance = sum((part.n * (part.high - part.mean) / Z_95) ** 2 for part in parts)
    return Estimate(sum(part.n * part.mean for part in parts) / n, math.sqrt(variance) / n, n)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with numbers aligned to the right."""
    rule = ["---" if name in TEXT_COLUMNS or not index else "---:" for index, name in enumerate(header)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def small(number: float | None) -> str:
    """Two significant digits, without exponents down to a ten-thousandth."""
    if number is None:
        return "-"
    if number < 5e-5:
        return "< .0001"
    return f"{number:.{max(2, 1 - math.floor(math.log10(number)))}f}"


def label_of(row: Row | Comparison) -> Label:
    return Label(row.method, row.key_ratio, row.restore_bits, row.values)


def is_variant(label: Label) -> bool:
    return label.method.startswith("spark, ") or "calibrated" in label.method


def estimate_of(part: Comparison | None) -> Estimate | None:
    return None if part is None else Estimate(part.mean, (part.high - part.mean) / Z_95, part.n)


def with_difference(value: float, difference: Estimate | None, label: Label) -> str:
    if label == DENSE or difference is None:
        return f"{value:.3f}"
    return f"{value:.3f} ({difference.mean:+.3f} ± {Z_95 * difference.se:.3f})"


def signed(part: Comparison | None) -> str:
    return "" if part is None else f"{part.mean:+.4f} ± {part.high - part.mean:.4f}"
