"""Accuracy and divergence against bytes, one line per method."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from accuracy.report_tables import Summary, Tables

SMALLEST_KL = 1e-5
PLOTTED = {
    "spark, 2 bits": lambda s: s.label.method == "spark" and s.label.restore_bits == 2 and s.label.values == "bf16",
    "spark, 1 bit": lambda s: s.label.method == "spark" and s.label.restore_bits == 1,
    "spark, 0 bits": lambda s: s.label.method == "spark" and s.label.restore_bits == 0,
    "spark, fp8 values": lambda s: s.label.method == "spark" and s.label.values == "fp8_e4m3",
    "spark, int4 values": lambda s: s.label.method == "spark" and s.label.values == "int4",
    "zero-fill": lambda s: s.label.method == "zero-fill",
    "authors' restoration": lambda s: s.label.method.startswith("SparK authors"),
    "ThinK": lambda s: s.label.method == "ThinK",
    "Mustafar": lambda s: s.label.method == "Mustafar" and s.label.values == "bf16",
    "StreamingLLM": lambda s: s.label.method.startswith("StreamingLLM"),
    "SnapKV": lambda s: s.label.method.startswith("SnapKV"),
    "int8/4/3/2 keys": lambda s: " keys, groups of 32" in s.label.method or s.label.method.startswith("int8 keys, "),
    "int8/4/3/2 keys and values": lambda s: s.label.method.startswith("int") and "keys and values" in s.label.method,
    "fp8 keys and values": lambda s: s.label.method == "fp8 keys and values",
}
MARKERS = "os^DPv<>X*hp8d"


def draw(tables: Tables, folder: Path) -> None:
    """``accuracy.png`` and ``kl.png`` in `folder`."""
    summaries = tables.summaries("simulation", tables.tasks("simulation"))
    _draw(summaries, folder / "accuracy.png", "exact match", lambda s: s.exact_match, log=False)
    _draw(summaries, folder / "kl.png", "KL to dense (nats per token)", lambda s: max(s.kl.mean, SMALLEST_KL), log=True)


def _draw(summaries: list[Summary], path: Path, name: str, value, *, log: bool) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), dpi=90)
    colors = plt.get_cmap("tab20")
    for index, (method, belongs) in enumerate(PLOTTED.items()):
        points = [(summary.size, value(summary)) for summary in summaries if belongs(summary)]
        if points:
            axes.plot(*zip(*points, strict=True), marker=MARKERS[index], ms=5, lw=1, label=method, color=colors(index))
    axes.set(xlabel="bytes of K + V per token and KV head (dense: 512)", ylabel=name)
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    # Without the date and version, the same results give the same file.
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
