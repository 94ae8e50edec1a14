#!/usr/bin/env python3
"""Exact match on recall questions, asked through the server, for the dense cache and for SparK settings.

Every setting gets a server of its own and the same questions over the chat endpoint; answers are compared with the
dense server's item by item, so the difference has a standard error of its own.
"""

from __future__ import annotations

import argparse
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from local_server import RECALL_MODEL, LocalServer  # noqa: E402
from recall_tasks import KINDS, RecallItem, make_items  # noqa: E402

CONCURRENT_REQUESTS = 4
# Two bfloat16 vectors of 128 channels.
DENSE_BYTES = 512.0


@dataclass(frozen=True)
class Setting:
    """One way of storing the cache."""

    name: str
    flags: tuple[str, ...]
    key_ratio: float
    restore_bits: int | None
    values: str


def spark(key_ratio: float, restore_bits: int, kv_cache_dtype: str = "auto") -> Setting:
    flags = ("--kv-compress", "spark", "--spark-key-ratio", str(key_ratio))
    flags += ("--spark-restore-bits", str(restore_bits), "--kv-cache-dtype", kv_cache_dtype)
    values = "bf16" if kv_cache_dtype == "auto" else kv_cache_dtype
    name = f"spark, ratio {key_ratio}, {restore_bits} bits, {values} values"
    return Setting(name, flags, key_ratio, restore_bits, values)


DENSE = Setting("dense", (), 0.0, None, "bf16")
SETTINGS = (
    DENSE,
    spark(0.8, 2),
    spark(0.8, 2, "fp8_e4m3"),
    spark(0.8, 1),
    spark(0.8, 0),
    spark(0.9, 2),
)


@dataclass(frozen=True)
class Row:
    """Result of one setting on one task and length; differences are to the dense server, paired by question."""

    method: str
    key_ratio: float
    restore_bits: int | None
    values: str
    bytes_per_token_head: float
    task: str
    length: int
    n: int
    exact_match: float
    exact_match_se: float
    difference: float
    difference_se: float
    source: str = "server"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(RECALL_MODEL), help="model folder")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000], help="document lengths in tokens")
    parser.add_argument("--items", type=int, default=25, help="documents per task and length")
    parser.add_argument("--seed", type=int, default=100, help="which documents")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()

    console = Console()
    tasks = {
        (kind, length): make_items(kind, arguments.seed, arguments.items, length)
        for kind in KINDS
        for length in arguments.lengths
    }
    rows: list[Row] = []
    dense_right: dict[tuple[str, int], list[bool]] = {}
    for setting in SETTINGS:
        with LocalServer("--max-total-tokens", "16384", *setting.flags, model=arguments.model) as server:
            size = bytes_per_token_head(server, setting)
            for (kind, length), items in track(tasks.items(), setting.name, console=console, transient=True):
                right = ask(server, items)
                dense_right.setdefault((kind, length), right)
                rows.append(summarize(setting, size, kind, length, right, dense_right[kind, length]))
    print_table(console, rows)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_bytes(orjson.dumps([asdict(row) for row in rows], option=orjson.OPT_INDENT_2))
    return 0


def ask(server: LocalServer, items: list[RecallItem]) -> list[bool]:
    """Whether each question of each item is answered; every turn goes on from the expected answers before it."""

    def conversation(item: RecallItem) -> list[bool]:
        return [
            asked.is_correct(server.chat(item.messages(turn), max_tokens=32).text)
            for turn, asked in enumerate(item.turns)
        ]

    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        return [right for answers in pool.map(conversation, items) for right in answers]


def bytes_per_token_head(server: LocalServer, setting: Setting) -> float:
    """Bytes of K + V per token and KV head of 128 channels, from the start-up line."""
    if setting is DENSE:
        return DENSE_BYTES
    capacity = server.capacity()
    return DENSE_BYTES * capacity.bytes_per_token / capacity.dense_bytes_per_token


def summarize(setting: Setting, size: float, kind: str, length: int, right: list[bool], dense: list[bool]) -> Row:
    differences = [int(a) - int(b) for a, b in zip(right, dense, strict=True)]
    return Row(
        method=setting.name,
        key_ratio=setting.key_ratio,
        restore_bits=setting.restore_bits,
        values=setting.values,
        bytes_per_token_head=size,
        task=kind,
        length=length,
        n=len(right),
        exact_match=mean(right),
        exact_match_se=standard_error(right),
        difference=mean(differences),
        difference_se=standard_error(differences),
    )


def mean(numbers: list) -> float:
    return sum(numbers) / len(numbers)


def standard_error(numbers: list) -> float:
    center = mean(numbers)
    return math.sqrt(sum((x - center) ** 2 for x in numbers)) / len(numbers)


def print_table(console: Console, rows: list[Row]) -> None:
    table = Table()
    for column in ("setting", "bytes", "task", "length", "n", "exact match", "to dense"):
        table.add_column(column, justify="left" if column in ("setting", "task") else "right")
    for row in rows:
        table.add_row(
            row.method,
            f"{row.bytes_per_token_head:.0f}",
            row.task,
            str(row.length),
            str(row.n),
            f"{row.exact_match:.3f}",
            f"{row.difference:+.3f} ± {row.difference_se:.3f}",
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
