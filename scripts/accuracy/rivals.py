"""SparK against what takes about as many bytes, paired by question."""

from __future__ import annotations

from accuracy.cells import is_variant, label_of
from accuracy.metrics import paired_difference
from accuracy.outcomes import Label, Outcome, OutcomeStore, comparison
from accuracy.results import Comparison
from accuracy.server_campaign import Files

RIVAL = "rival: "
RIVALS = (
    (Label("spark", 0.8, 2), Label("spark", 0.7, 0)),
    (Label("spark", 0.9, 2), Label("spark", 0.8, 1)),
    (Label("spark", 0.9, 2), Label("spark", 0.8, 0)),
    (Label("spark", 0.8, 2), Label("int4 keys, groups of 32")),
    (Label("spark", 0.8, 2), Label("SparK authors' restoration", 0.8)),
    (Label("spark", 0.8, 1), Label("Mustafar", 0.8)),
    (Label("spark", 0.8, 2), Label("SnapKV, 67% of tokens")),
    (Label("spark", 0.8, 2, "fp8_e4m3"), Label("fp8 keys and values", values="fp8_e4m3")),
    (Label("spark", 0.8, 2, "fp8_e4m3"), Label("Mustafar", 0.7, values="pruned")),
    (Label("spark", 0.8, 2, "int4"), Label("int4 keys and values, groups of 32", values="int4")),
    (Label("spark", 0.9, 2, "int4"), Label("int4 keys and values, groups of 128", values="int4")),
    (Label("spark", 0.9, 2, "int4"), Label("int3 keys and values, groups of 32", values="int3")),
)


def compare_rivals(files: Files) -> None:
    """Comparisons of every pair on every task and length that both were simulated on."""
    store = OutcomeStore(files.work, "simulation")
    labels = dict.fromkeys(label_of(row) for row in files.rows.find(source="simulation"))
    # A variant is compared with what it varies; plain integers with the default.
    variants = [(label, Label("spark", 0.8, label.restore_bits or 2)) for label in labels if is_variant(label)]
    cells = dict.fromkeys((row.task, row.length) for row in files.rows.find(source="simulation"))
    for task, length in cells:
        for label, rival in (*RIVALS, *variants):
            ours, theirs = (store.load(each, task, length) for each in (label, rival))
            if ours and theirs:
                files.comparisons.add(*compare_pair(label, rival, task, length, ours, theirs))


def compare_pair(
    label: Label, rival: Label, task: str, length: int, ours: list[Outcome], theirs: list[Outcome]
) -> list[Comparison]:
    """Differences in exact match and in divergence per question, `label` less `rival`."""
    items = [outcome.item for outcome in ours]
    right = [[outcome.right for outcome in outcomes] for outcomes in (ours, theirs)]
    kl = [[sum(outcome.kl) / len(outcome.kl) for outcome in outcomes] for outcomes in (ours, theirs)]
    found = {"exact_match": paired_difference(*right, items), "kl": paired_difference(*kl, items)}
    return [
        comparison(label, task, length, metric, f"{RIVAL}{rival}", value, "simulation")
        for metric, value in found.items()
    ]
