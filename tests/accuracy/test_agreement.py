"""Pairing of outcomes: simulation with server, method with rival."""

import pytest

from accuracy.agreement import compare_outcomes, compare_sources
from accuracy.outcomes import DENSE, Label, Outcome, OutcomeStore, make_row
from accuracy.rivals import RIVAL, RIVALS, compare_rivals
from accuracy.server_campaign import Files
from baselines import METHODS

SPARK = Label("spark", 0.8, 2)


def outcomes(right, kl):
    pairs = zip(right, kl, strict=True)
    return [Outcome(item, float(hit), (True,), (True,), (number,)) for item, (hit, number) in enumerate(pairs)]


def numbers(rows):
    return {row.metric: row.mean for row in rows}


def test_the_server_may_have_been_asked_more():
    simulated = outcomes([1, 0, 1], [0.1, 0.2, 0.4])
    served = outcomes([1, 1, 1, 0, 0], [0.2, 0.4, 0.8, 5.0, 5.0])
    found = numbers(compare_outcomes(SPARK, "kv_list", 512, simulated, served))
    assert found["same outcome"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["kl"] == pytest.approx(-0.7 / 3, abs=1e-6)
    assert found["correlation of log kl"] == pytest.approx(1, abs=1e-6)


def test_rounding_is_not_disagreement():
    found = compare_outcomes(SPARK, "kv_list", 512, outcomes([1, 1], [1e-7, 3e-6]), outcomes([1, 1], [2e-6, 0.0]))
    assert numbers(found)["correlation of log kl"] == 1


@pytest.fixture
def files(tmp_path):
    files = Files.open(tmp_path / "results", tmp_path / "work")
    for source in ("server", "simulation"):
        store = OutcomeStore(files.work, source)
        for label, kl in ((DENSE, 0.0), (SPARK, 0.1), (Label("int4 keys, groups of 32"), 0.3)):
            found = outcomes([1, 1, 0], [kl, kl, 2 * kl])
            store.save(label, "kv_list", 512, found)
            files.rows.add(make_row(label, 344, "kv_list", 512, found, source))
    return files


def test_sources_are_compared_where_both_have_been_asked(files):
    compare_sources(files)
    methods = {row.method for row in files.comparisons.rows}
    assert methods == {"spark", "int4 keys, groups of 32"}
    assert all(row.mean == 1 for row in files.comparisons.find(metric="same outcome"))


def test_rivals_are_compared_where_both_have_been_asked(files):
    compare_rivals(files)
    exact, kl = files.comparisons.rows
    assert exact.against == kl.against == f"{RIVAL}int4 keys, groups of 32"
    assert exact.mean == 0 and kl.mean == pytest.approx(-0.8 / 3, abs=1e-6)


def test_rivals_are_simulated():
    labels = {method.label for method in METHODS}
    assert {label for pair in RIVALS for label in pair} <= labels
