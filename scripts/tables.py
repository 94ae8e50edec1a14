"""Markdown tables, and documents whose tables stand between markers."""

from __future__ import annotations

import re
from collections.abc import Sequence


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; columns after the first are aligned to the right."""
    rule = ["---:" if index else "---" for index, _ in enumerate(header)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def fill(text: str, tables: dict[str, str]) -> str:
    """``text`` with each table between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.

    Raises
    ------
    ValueError
        The text has a marker that no table is made for, or lacks one.
    """
    wanted = set(re.findall(r"<!-- begin (\S+) -->", text))
    if wanted != tables.keys():
        raise ValueError(f"markers and tables differ: {sorted(wanted ^ tables.keys())}")
    for name, table in tables.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _, t=table, b=begin, e=end: f"{b}\n{t}\n{e}", text, flags=re.DOTALL)
    return text
