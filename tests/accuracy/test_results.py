"""Result files, outcomes on disk and the rows made of them: what a stopped run needs to go on."""

import json
from dataclasses import replace

import numpy as np
import pytest

from accuracy.metrics import NextToken
from accuracy.outcomes import DENSE, Label, Outcome, OutcomeStore, make_comparisons, make_row
from accuracy.references import load_references, save_references
from accuracy.results import ResultsFile, Row
from accuracy.server_runs import Reference

ROW = Row("spark", 0.8, 2, "bf16", 344.0, "kv_list", 1024, 40, 0.975, 0.02, 0.004, "server")


def test_rows_have_the_published_fields(tmp_path):
    ResultsFile(tmp_path / "results.json", Row).add(ROW)
    (record,) = json.loads((tmp_path / "results.json").read_text())
    fields = "method key_ratio restore_bits values bytes_per_token_head task length n exact_match exact_match_se kl"
    assert list(record) == [*fields.split(), "source"]


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "results.json"
    other = replace(ROW, task="copying", kl=None)
    ResultsFile(path, Row).add(ROW, other)
    assert ResultsFile(path, Row).rows == [ROW, other]
    assert ResultsFile(path, Row).find(task="copying", source="server") == [other]


def test_a_row_measured_again_takes_the_place_of_the_old_one(tmp_path):
    results = ResultsFile(tmp_path / "results.json", Row)
    results.add(ROW)
    results.add(replace(ROW, n=80))
    assert [row.n for row in ResultsFile(results.path, Row).rows] == [80]


def test_two_runs_add_to_one_file(tmp_path):
    one, two = (ResultsFile(tmp_path / "results.json", Row) for _ in range(2))
    one.add(ROW)
    two.add(replace(ROW, source="simulation"))
    one.add(replace(ROW, task="copying"))
    assert len(ResultsFile(one.path, Row).rows) == 3


@pytest.mark.parametrize("change", [{"extra": 1}, {"kl": ...}], ids=["unknown", "missing"])
def test_wrong_fields_are_refused(tmp_path, change):
    path = tmp_path / "results.json"
    ResultsFile(path, Row).add(ROW)
    (record,) = json.loads(path.read_text())
    record |= change
    path.write_text(json.dumps([{name: value for name, value in record.items() if value is not ...}]))
    with pytest.raises(ValueError, match=f"row 0 has wrong fields: \\['{next(iter(change))}'\\]"):
        ResultsFile(path, Row)


def test_repeated_rows_are_refused(tmp_path):
    path = tmp_path / "results.json"
    ResultsFile(path, Row).add(ROW)
    path.write_text(json.dumps(json.loads(path.read_text()) * 2))
    with pytest.raises(ValueError, match="row 1 repeats"):
        ResultsFile(path, Row)


def outcomes(*right, kl=0.0):
    return [Outcome(item, float(hit), (True, bool(hit)), (True, True), (0.0, kl)) for item, hit in enumerate(right)]


def test_outcomes_are_kept(tmp_path):
    store = OutcomeStore(tmp_path, "server")
    label = Label("spark", 0.8, 2)
    assert store.load(label, "kv_list", 1024) is None
    store.save(label, "kv_list", 1024, outcomes(1, 0))
    assert store.load(label, "kv_list", 1024) == outcomes(1, 0)
    assert store.load(DENSE, "kv_list", 1024) is None
    assert OutcomeStore(tmp_path, "simulation").load(label, "kv_list", 1024) is None


def test_rows_of_outcomes():
    label = Label("spark", 0.8, 2, "fp8_e4m3")
    row = make_row(label, 216.0, "kv_list", 512, outcomes(1, 1, 0, 1, kl=0.5), "server")
    assert (row.exact_match, row.n, row.kl, row.values) == (0.75, 4, 0.25, "fp8_e4m3")
    without = make_row(label, 216.0, "kv_list", 512, [Outcome(0, 1.0), Outcome(1, 0.0)], "server")
    assert without.kl is None


def test_comparisons_are_paired_with_dense():
    found = make_comparisons(Label("spark"), "kv_list", 512, outcomes(1, 1, 0, 1), outcomes(1, 1, 1, 1), "server")
    numbers = {(row.metric, row.against): row for row in found}
    assert numbers["exact_match", "dense"].mean == -0.25
    assert numbers["exact_match", "dense"].low < -0.25 < numbers["exact_match", "dense"].high
    assert numbers["token_accuracy", "expected answer"].mean == 0.875
    assert numbers["token_accuracy", "expected answer"].n == 8
    alone = make_comparisons(Label("spark"), "kv_list", 512, outcomes(1), None, "server")
    assert ("exact_match", "dense") not in {(row.metric, row.against) for row in alone}


def test_references_are_kept(tmp_path):
    def step(seed):
        generator = np.random.default_rng(seed)
        return NextToken(generator.permutation(9).astype(np.int32), generator.normal(size=9).astype(np.float32))

    references = {(0, 0): Reference([3, 4], [step(0), step(1)]), (1, 2): Reference([5], [step(2)])}
    path = tmp_path / "x" / "references.npz"
    assert load_references(path) == {}
    save_references(path, references)
    loaded = load_references(path)
    assert loaded.keys() == references.keys()
    for key, reference in references.items():
        assert loaded[key].ids == reference.ids
        for mine, theirs in zip(loaded[key].steps, reference.steps, strict=True):
            np.testing.assert_array_equal(mine.ids, theirs.ids)
            np.testing.assert_array_equal(mine.logprobs, theirs.logprobs)
