"""``docs/accuracy.md``: tables between markers, written from the committed result files and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from accuracy.outcomes import DENSE, Label
from accuracy.report_tables import Tables
from accuracy.results import Comparison, ResultsFile, Row, StressRow

__all__ = ["DENSE", "Label", "write_report"]


def write_report(document: Path, results: Path, *, plots: bool) -> None:
    """Replaces what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``, and draws the plots.

    Raises
    ------
    ValueError
        The document has a marker that no table is made for, or lacks one.
    """
    tables = Tables(
        ResultsFile(results / "results.json", Row).rows,
        ResultsFile(results / "comparisons.json", Comparison).rows,
        ResultsFile(results / "stress.json", StressRow).rows,
    )
    document.write_text(fill(document.read_text(), tables.all()))
    if plots:
        from accuracy.plots import draw

        draw(tables, results)


def fill(text: str, tables: dict[str, str]) -> str:
    """`text` with each table between its markers."""
    wanted = set(re.findall(r"<!-- begin (\S+) -->", text))
    if wanted != tables.keys():
        raise ValueError(f"markers and tables differ: {sorted(wanted ^ tables.keys())}")
    for name, table in tables.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _, t=table, b=begin, e=end: f"{b}\n{t}\n{e}", text, flags=re.DOTALL)
    return text
