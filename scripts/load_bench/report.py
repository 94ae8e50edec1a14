"""Results as tables, JSON, a section of a page, and a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from load_bench.budget import MIB
from load_bench.workloads import BENCH_SERVING, MULTI_TURN, WORKLOADS
from tables import fill, markdown

Row = dict[str, Any]


def _share(value: float) -> str:
    return f"{value:.1%}"


def _count(value: int) -> str:
    return f"{value:,}"


def _number(value: float) -> str:
    return f"{value:,.1f}"


def _mebibytes(value: int) -> str:
    return f"{value / MIB:.3f}"


def _seconds(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.2f}"


# Heading, field of a row, and how it is written; a field that is None is a dash.
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("cache MiB", "pool_bytes", _mebibytes),
    ("tokens that fit", "pool_tokens", _count),
    ("answered", "completed", _count),
    ("right answers", "right", _share),
    ("cache hits", "hit_rate", _share),
    ("retractions", "retractions", _count),
    ("tokens evicted", "evicted_tokens", _count),
    ("most running", "peak_running", _count),
    ("output tokens/s", "output_throughput", _number),
    ("requests/s", "request_throughput", _number),
    ("TTFT s, p50", "ttft_p50_ms", _seconds),
    ("p99", "ttft_p99_ms", _seconds),
    ("latency s, p50", "latency_p50_ms", _seconds),
    ("p99", "latency_p99_ms", _seconds),
)
_RETRACTIONS = ("retractions", "retractions", _count)
_THROUGHPUT = ("output tokens/s", "output_throughput", _number)
# By workload; requests of bench-serving share nothing.
PLOTTED = {
    MULTI_TURN: (("cache hits, share of prompt tokens", "hit_rate", _share), _RETRACTIONS, _THROUGHPUT),
    BENCH_SERVING: (("TTFT ms, p99", "ttft_p99_ms", _number), _RETRACTIONS, _THROUGHPUT),
}


def make_tables(rows: Sequence[Row]) -> list[Table]:
    """One per workload, for the screen."""
    tables = []
    for workload, header, lines in _cells(rows):
        table = Table(title=f"{workload}, {lines[0]['requests']} requests")
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left")
        for line in lines:
            table.add_row(*line["cells"])
        tables.append(table)
    return tables


def make_markdown(rows: Sequence[Row]) -> dict[str, str]:
    """By workload, a table."""
    return {workload: markdown(header, [line["cells"] for line in lines]) for workload, header, lines in _cells(rows)}


def write_json(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """A list of rows, each with the settings of the run."""
    path.write_text(json.dumps([row | about for row in rows], indent=1) + "\n")


def has_table(page: Path, name: str) -> bool:
    """Whether ``page`` is there and has a place for a table."""
    return page.is_file() and f"<!-- begin {name} -->" in page.read_text()


def write_page(page: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` in ``page``.

    Raises
    ------
    ValueError
        The page's markers are not ``about`` and the workloads of ``rows``.
    """
    lines = [f"* {name}: {value}" for name, value in about.items()]
    page.write_text(fill(page.read_text(), {"about": "\n".join(lines), **make_markdown(rows)}))


def _cells(rows: Sequence[Row]) -> list[tuple[str, list[str], list[Row]]]:
    """By workload: the header, and its rows with their ``cells``."""
    found = []
    for workload in WORKLOADS:
        mine = [row for row in rows if row["workload"] == workload]
        if mine:
            columns = [column for column in COLUMNS if any(row[column[1]] is not None for row in mine)]
            found.append((workload, ["server", *(name for name, _, _ in columns)], _with_cells(mine, columns)))
    return found


def _with_cells(rows: Sequence[Row], columns: Sequence[tuple[str, str, Callable[[Any], str]]]) -> list[Row]:
    return [
        row
        | {"cells": [row["server"], *("-" if row[field] is None else write(row[field]) for _, field, write in columns)]}
        for row in rows
    ]


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Bars, a panel per workload and number; the suffix of ``path`` is the format."""
    from matplotlib.figure import Figure

    workloads = [workload for workload in WORKLOADS if any(row["workload"] == workload for row in rows)]
    figure = Figure(figsize=(10, 2.8 * len(workloads)), dpi=90, layout="constrained")
    for line, workload in zip(figure.subplots(len(workloads), 3, squeeze=False), workloads, strict=True):
        mine = [row for row in rows if row["workload"] == workload]
        servers = [row["server"] for row in mine]
        colors = ["tab:blue" if name.startswith("spark") else "tab:gray" for name in servers]
        for axes, (label, field, write) in zip(line, PLOTTED[workload], strict=True):
            values = [row[field] or 0 for row in mine]
            axes.bar_label(axes.bar(servers, values, color=colors), map(write, values), fontsize="small")
            axes.set_title(f"{workload}: {label}", fontsize="small")
            axes.set_ylim(0, 1.15 * max(*values, 0.1))
            axes.tick_params(labelsize="x-small")
            axes.tick_params(axis="x", rotation=20)
    figure.suptitle(title, fontsize="medium")
    # Without the date and version, the same results give the same file.
    figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)
