"""Whether the simulation says what the server says: the same questions, one by one."""

from __future__ import annotations

import numpy as np

from accuracy.metrics import Estimate, estimate, paired_difference
from accuracy.outcomes import DENSE, Label, Outcome, OutcomeStore, comparison
from accuracy.results import Comparison
from accuracy.server_campaign import Files

# Divergences below are rounding: the server computes in bf16, the simulation in float32.
SMALLEST_KL = 1e-5


def compare_sources(files: Files) -> None:
    """Comparisons of every method, task and length that both have asked."""
    server, simulation = (OutcomeStore(files.work, source) for source in ("server", "simulation"))
    for row in files.rows.find(source="server"):
        label = Label(row.method, row.key_ratio, row.restore_bits, row.values)
        ours, theirs = (store.load(label, row.task, row.length) for store in (simulation, server))
        if label != DENSE and ours and theirs:
            files.comparisons.add(*compare_outcomes(label, row.task, row.length, ours, theirs))


def compare_outcomes(
    label: Label, task: str, length: int, simulated: list[Outcome], served: list[Outcome]
) -> list[Comparison]:
    """Share of questions with the same outcome, the difference in divergence, and how divergences are correlated.

    The server may have been asked about more documents: item i does not depend on their number.
    """
    count = min(max(outcome.item for outcome in outcomes) for outcomes in (simulated, served)) + 1
    simulated, served = ([o for o in outcomes if o.item < count] for outcomes in (simulated, served))
    items = [outcome.item for outcome in served]
    same = [float(a.right == b.right) for a, b in zip(simulated, served, strict=True)]
    divergences = [[sum(outcome.kl) / len(outcome.kl) for outcome in outcomes] for outcomes in (simulated, served)]
    found = {
        "same outcome": estimate(same, items),
        "kl": paired_difference(*divergences, items),
        "correlation of log kl": _log_correlation(*divergences),
    }
    return [comparison(label, task, length, name, "server", value, "simulation") for name, value in found.items()]


def _log_correlation(ours: list[float], theirs: list[float]) -> Estimate:
    logs = np.log(np.maximum(np.array([ours, theirs]), SMALLEST_KL))
    spread = logs.std(axis=1).min()
    value = float(np.corrcoef(logs)[0, 1]) if spread > 0 else 1.0
    # Fisher's approximation.
    return Estimate(value, (1 - value**2) / max(1, len(ours) - 3) ** 0.5, len(ours))
