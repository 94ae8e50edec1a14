"""Results as tables, JSON and a plot."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from rich.table import Table

_LINES = {
    "flashinfer_bf16_ms": "FlashInfer bf16",
    "flashinfer_fp8_ms": "FlashInfer fp8",
    "triton_ms": "SGLang Triton bf16",
}


def cpu_table(rows: list[dict]) -> Table:
    """Of `decode_bench.cpu.measure`."""
    table = Table("batch", "tokens", "spark ms", "dense ms", "ratio", title="Decode attention, one layer")
    for row in rows:
        numbers = f"{row['spark_ms']:.3f}", f"{row['dense_ms']:.3f}", f"{row['ratio']:.1f}"
        table.add_row(str(row["batch"]), str(row["seq_len"]), *numbers)
    return table


def decode_table(rows: list[dict]) -> Table:
    """Of `decode_bench.cuda.measure`."""
    table = Table(title="Decode attention, microseconds per layer, captured in a CUDA graph if not said otherwise")
    for name in ("batch", "tokens", "setting"):
        table.add_column(name)
    for name in ("spark", "eager", "copy", "of roofline", *_LINES.values(), "dense / spark"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["batch"]),
            f"{row['seq_len']:,}",
            row["setting"],
            *(microseconds(row[name]) for name in ("spark_ms", "spark_eager_ms", "copy_ms")),
            f"{row['roofline']:.0%}",
            *(microseconds(row[name]) for name in _LINES),
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        )
    table.caption = missing_caption(rows)
    return table


def prefill_table(rows: list[dict]) -> Table:
    """Of `decode_bench.prefill.measure`."""
    table = Table(title="Prefill of a chunk, microseconds per layer")
    for name in ("chunk", "prefix", "setting"):
        table.add_column(name)
    names = ("write_ms", "extend_ms", "store_ms", "dense_ms", "linear_ms")
    for name in ("write", "extend", "dense store", "dense extend", "matrix products", "over dense"):
        table.add_column(name, justify="right")
    for row in rows:
        overhead = "-" if row["overhead"] is None else f"{row['overhead']:+.1%}"
        times = (microseconds(row[name]) for name in names)
        table.add_row(f"{row['chunk']:,}", f"{row['prefix']:,}", row["setting"], *times, overhead)
    table.caption = missing_caption(rows)
    return table


def microseconds(ms: float | None) -> str:
    return "-" if ms is None else f"{1e3 * ms:.1f}"


def missing_caption(rows: list[dict]) -> str | None:
    """Why numbers are missing, or None if none are."""
    reasons = {f"{name}: {reason}" for row in rows for name, reason in row["missing"].items()}
    return "\n".join(sorted(reasons)) or None


def write_json(path: Path, rows: list[dict], settings: dict) -> None:
    """A list of rows, each with the settings of the run."""
    path.write_text(json.dumps([row | settings for row in rows], indent=1) + "\n")


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(path: Path, rows: list[dict], title: str) -> None:
    """Microseconds against tokens per request, a panel per batch; the suffix of ``path`` is the format."""
    from matplotlib.figure import Figure

    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(4.5 * len(batches), 4.5), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        at_batch = [row for row in rows if row["batch"] == batch]
        settings = sorted({row["setting"] for row in at_batch})
        for setting in settings:
            mine = [row for row in at_batch if row["setting"] == setting]
            _line(axes, mine, "spark_ms", f"spark, {setting}", "-o")
        one_setting = [row for row in at_batch if row["setting"] == settings[0]]
        _line(axes, one_setting, "copy_ms", f"copy of the bytes, {settings[0]}", ":")
        for name, label in _LINES.items():
            _line(axes, one_setting, name, label, "--")
        axes.set(xscale="log", yscale="log", title=f"batch {batch}", xlabel="tokens per request", ylabel="µs per layer")
        axes.legend(fontsize="x-small")
    figure.suptitle(title)
    figure.savefig(path)


def _line(axes, rows: list[dict], name: str, label: str, style: str) -> None:
    points = sorted((row["seq_len"], 1e3 * row[name]) for row in rows if row[name] is not None)
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label)
