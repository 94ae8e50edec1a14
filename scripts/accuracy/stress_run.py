"""Runs the synthetic stress over head dimensions, kinds of keys and methods."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from accuracy.metrics import estimate
from accuracy.results import ResultsFile, StressRow
from baselines import METHODS, ChannelStatistics, calibrated_variants
from baselines.base import Method
from baselines.stress import KEY_MODELS, Errors, KeyModel, errors

HEAD_DIMS = (64, 128, 256)
CALIBRATION_SEED = 1_000


def run_stress(folder: Path, draws: int) -> None:
    """Rows of ``stress.json``; goes on where it was stopped."""
    results = ResultsFile(folder / "stress.json", StressRow)
    cells = [(head_dim, key_model) for head_dim in HEAD_DIMS for key_model in KEY_MODELS]
    with Progress() as progress:
        bar = progress.add_task("synthetic keys", total=len(cells))
        for head_dim, key_model in cells:
            if not results.find(head_dim=head_dim, keys=key_model.name):
                results.add(*stress_rows(head_dim, key_model, draws))
            progress.advance(bar)


def stress_rows(head_dim: int, key_model: KeyModel, draws: int) -> list[StressRow]:
    """Errors of every method that changes keys, each on the same draws."""
    found: dict[str, list[tuple[Method, Errors]]] = {}
    for seed in range(draws):
        chunk, queries = key_model.draw(head_dim, seed)
        # Statistics belong to a head, so they are taken from the first half of the same keys.
        statistics = ChannelStatistics.of([chunk.k[: len(chunk.k) // 2]])
        for method in (*key_methods(head_dim), *calibrated_variants(statistics)):
            found.setdefault(str(method.label), []).append((method, errors(method, chunk, queries)))
    return [_row(name, head_dim, key_model.name, results) for name, results in found.items()]


def key_methods(head_dim: int) -> list[Method]:
    """Those of `METHODS` that change keys and keep values."""
    dense = Method()
    return [
        method
        for method in METHODS
        if method.key_bytes(head_dim) != dense.key_bytes(head_dim)
        and method.value_bytes(head_dim) == dense.value_bytes(head_dim)
    ]


def _row(name: str, head_dim: int, keys: str, results: list[tuple[Method, Errors]]) -> StressRow:
    output = estimate([found.output for _, found in results])
    return StressRow(
        method=name,
        head_dim=head_dim,
        keys=keys,
        key_bytes=round(results[0][0].key_bytes(head_dim), 2),
        n=len(results),
        logit_error=round(estimate([found.logits for _, found in results]).mean, 5),
        output_error=round(output.mean, 5),
        output_error_se=round(output.se, 5),
    )
