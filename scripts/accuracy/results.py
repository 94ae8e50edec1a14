"""Result files: rows with fixed fields, unique by key, written after each addition so that runs can be resumed."""

from __future__ import annotations

import fcntl
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import orjson

Source = Literal["server", "simulation"]


@dataclass(frozen=True)
class Row:
    """One method on one task and length.

    Parameters
    ----------
    method
        Which method, ``dense`` and ``spark`` among them.
    key_ratio, restore_bits
        Share of key channels dropped at most, and bits that restore each; 0 and None where a method has none.
    values
        How values are stored: bf16, fp8_e4m3, int4 and so on.
    bytes_per_token_head
        Bytes of K + V per token and KV head, averaged over layers.
    task, length, n
        Task, length of the document in tokens, and number of questions.
    exact_match, exact_match_se
        Share of questions answered right, and its standard error with documents as clusters.
    kl
        Mean KL divergence in nats of the next-token distributions to the dense cache's, along the expected answer;
        None where the server gives no log-probabilities.
    source
        ``server``: asked through the public endpoints; ``simulation``: a plain forward over transformed keys and
        values.
    """

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
    kl: float | None
    source: Source

    KEY: ClassVar = ("method", "key_ratio", "restore_bits", "values", "task", "length", "source")


@dataclass(frozen=True)
class Comparison:
    """One number about one method, mostly its paired difference to something else, with a 95 % interval.

    Parameters
    ----------
    method, key_ratio, restore_bits, values, task, length, source
        As in `Row`.
    metric
        What was measured.
    against
        What it is compared with.
    n, mean, low, high
        Number of questions, mean and interval (documents as clusters).
    """

    method: str
    key_ratio: float
    restore_bits: int | None
    values: str
    task: str
    length: int
    metric: str
    against: str
    n: int
    mean: float
    low: float
    high: float
    source: Source

    KEY: ClassVar = ("method", "key_ratio", "restore_bits", "values", "task", "length", "metric", "against", "source")


@dataclass(frozen=True)
class StressRow:
    """Errors of one method on synthetic keys: relative to the dense logits' spread and the dense outputs' norm."""

    method: str
    head_dim: int
    keys: str
    key_bytes: float
    n: int
    logit_error: float
    output_error: float
    output_error_se: float

    KEY: ClassVar = ("method", "head_dim", "keys")


T = TypeVar("T", Row, Comparison, StressRow)


class ResultsFile(Generic[T]):
    """A JSON list of rows of one type.

    Raises
    ------
    ValueError
        The file holds a row with missing or unknown fields, or two rows with the same key.
    """

    def __init__(self, path: Path, row_type: type[T]):
        self.path = path
        self.row_type = row_type
        self._rows = self._read()

    def _read(self) -> dict[tuple, T]:
        rows: dict[tuple, T] = {}
        for number, record in enumerate(orjson.loads(self.path.read_bytes()) if self.path.exists() else []):
            row = self._parse(record, number)
            if self.key(row) in rows:
                raise ValueError(f"{self.path}: row {number} repeats {self.key(row)}")
            rows[self.key(row)] = row
        return rows

    def _parse(self, record: dict[str, Any], number: int) -> T:
        expected = {field.name for field in fields(self.row_type)}
        if record.keys() != expected:
            raise ValueError(f"{self.path}: row {number} has wrong fields: {sorted(expected ^ record.keys())}")
        return self.row_type(**record)

    def key(self, row: T) -> tuple:
        return tuple(getattr(row, name) for name in row.KEY)

    @property
    def rows(self) -> list[T]:
        return list(self._rows.values())

    def find(self, **wanted: Any) -> list[T]:
        """Rows whose fields have the given values."""
        return [row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())]

    def add(self, *rows: T) -> None:
        """Adds rows, in the place of those with the same key, and writes the file.

        Runs side by side may add to one file: each reads it anew under a lock.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._rows = self._read() | {self.key(row): row for row in rows}
            text = b"[\n" + b",\n".join(orjson.dumps(asdict(row)) for row in self.rows) + b"\n]\n"
            temporary = self.path.with_suffix(".tmp")
            temporary.write_bytes(text)
            os.replace(temporary, self.path)
