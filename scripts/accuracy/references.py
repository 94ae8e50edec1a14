"""The dense server's distributions on disk, so that settings can be measured one after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from accuracy.metrics import NextToken
from accuracy.server_runs import Reference


def save_references(path: Path, references: dict[tuple[int, int], Reference]) -> None:
    """One ``.npz`` file: per question its key and tokens, per token the ids and log-probabilities of the likeliest."""
    keys = sorted(references)
    steps = [step for key in keys for step in references[key].steps]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        keys=np.array(keys),
        lengths=np.array([len(references[key].ids) for key in keys]),
        tokens=np.array([token for key in keys for token in references[key].ids]),
        ids=np.stack([step.ids for step in steps]),
        logprobs=np.stack([step.logprobs for step in steps]),
    )


def load_references(path: Path) -> dict[tuple[int, int], Reference]:
    """What `save_references` wrote; empty if there is no such file."""
    if not path.exists():
        return {}
    with np.load(path) as stored:
        arrays = dict(stored)
    references: dict[tuple[int, int], Reference] = {}
    start = 0
    for (item, turn), length in zip(arrays["keys"].tolist(), arrays["lengths"].tolist(), strict=True):
        span = slice(start, start + length)
        steps = [NextToken(*pair) for pair in zip(arrays["ids"][span], arrays["logprobs"][span], strict=True)]
        references[item, turn] = Reference(arrays["tokens"][span].tolist(), steps)
        start += length
    return references
