#!/usr/bin/env python3
"""Writes docs/accuracy/tables.md and kl.png from the JSON files of offline.py there and of servers.py in servers/.

pip install matplotlib && python scripts/eval/report.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tables import markdown

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "accuracy"
HEADER = ("method", "key bytes", "value bytes", "together", "KL", "loss beyond dense", "same likeliest token")
SMALLEST_KL = 1e-4
DRAWN_PREFIX = 1000


def read(folder: Path) -> list[dict[str, Any]]:
    """Results, by model, offset and tokens before.

    Raises
    ------
    SystemExit
        There is none.
    """
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise SystemExit(f"{folder} has no results: write some with scripts/eval/offline.py -o {folder}/NAME.json")
    return sorted(results, key=lambda result: (result["model"], result["offset"], result["prefix"]))


def read_servers(folder: Path) -> list[dict[str, Any]]:
    """What servers said, by model."""
    return [json.loads(path.read_text()) for path in sorted((folder / "servers").glob("*.json"))]


def title(result: dict[str, Any]) -> str:
    shift = f", positions from {result['offset']:,} on" if result["offset"] else ""
    return f"{result['model']}, head_dim {result['head_dim']}{shift}"


def table(result: dict[str, Any]) -> str:
    """All methods of one result, by falling size."""
    lines = []
    for row in sorted(result["rows"], key=lambda row: (-_size(row), row["method"])):
        sizes = (row["key_bytes"], row["value_bytes"], _size(row))
        figures = (f"{row['kl']:.4f}", f"{row['loss']:+.4f}", f"{row['top1']:.1%}")
        lines.append((row["method"], *(f"{size:g}" for size in sizes), *figures))
    return markdown(HEADER, lines)


def servers_table(result: dict[str, Any]) -> str:
    """What servers of one model said, by task."""
    tasks = [task for task in result["rows"][0] if task not in ("server", "loss")]
    lines = []
    for row in result["rows"]:
        loss = row.get("loss")
        figures = (f"{loss['kl']:.4f}", f"{loss['loss']:+.4f}") if loss else ("-", "-")
        counts = [f"{row[task]['right']} of {row[task]['of']}" for task in tasks]
        lines.append((row["server"], *figures, *counts))
    return markdown(("server", "KL", "loss beyond dense", *tasks), lines)


def document(results: list[dict[str, Any]], of_servers: list[dict[str, Any]] = ()) -> str:
    """The file of tables."""
    parts = [
        "# Accuracy: tables\n\nWritten by `python scripts/eval/report.py` from the JSON files beside it; "
        "[accuracy.md](../accuracy.md) says what they mean. Bytes are per token and KV head."
    ]
    for result in results:
        decoded = result["documents"] * result["tokens"]
        read_from = f"{result['documents']} x {result['tokens']} tokens ({decoded} in all) after {result['prefix']}"
        parts.append(f"## {title(result)}\n\n{read_from}.\n\n{table(result)}")
    for result in of_servers:
        asked = f"{result['documents']} x {result['tokens']} tokens in chunks of 64, {result['dtype']}"
        parts.append(f"## Through servers: {result['model']}\n\n{asked}.\n\n{servers_table(result)}")
    return "\n\n".join(parts) + "\n"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """KL against bytes of keys and values, one panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(results), figsize=(5 * len(results), 4.5), dpi=90, squeeze=False)
    for axes, result in zip(panels[0], results, strict=True):
        for row in result["rows"]:
            size, kl = _size(row), max(row["kl"], SMALLEST_KL)
            is_ours = row["method"].startswith("spark,")
            axes.plot(size, kl, "o" if is_ours else "x", color="tab:red" if is_ours else "tab:grey")
            axes.annotate(row["method"].removeprefix("spark, "), (size, kl), fontsize=6, xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
        axes.set(title=title(result), xlabel=f"bytes of K + V (dense: {4 * result['head_dim']})", yscale="log")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("KL to dense (nats per token)")
    figure.tight_layout()
    # Without the version, the same results give the same file.
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _size(row: dict[str, Any]) -> float:
    return row["key_bytes"] + row["value_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the results (%(default)s)")
    folder = parser.parse_args().folder
    results = read(folder)
    (folder / "tables.md").write_text(document(results, read_servers(folder)))
    drawn = [result for result in results if not result["offset"] and result["prefix"] == DRAWN_PREFIX]
    draw(drawn, folder / "kl.png")


if __name__ == "__main__":
    main()
