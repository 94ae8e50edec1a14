"""The report from a handful of rows."""

import pytest

from accuracy.cells import pool, small
from accuracy.outcomes import DENSE, Label, Outcome, make_comparisons, make_row
from accuracy.report import fill, write_report
from accuracy.report_tables import Tables
from accuracy.results import Comparison, ResultsFile, Row, StressRow
from accuracy.rivals import compare_pair
from accuracy.sharing import CONDITIONS, compare

SPARK = Label("spark", 0.8, 2)
THINK = Label("ThinK", 0.8)


def outcomes(right, kl):
    return [Outcome(item, float(hit), (bool(hit),), (True,), (kl,)) for item, hit in enumerate(right)]


@pytest.fixture
def results(tmp_path):
    rows, comparisons = (
        ResultsFile(tmp_path / "results.json", Row),
        ResultsFile(tmp_path / "comparisons.json", Comparison),
    )
    dense = outcomes([1, 1, 1, 0], 0.0)
    for source in ("server", "simulation"):
        for task in ("kv_list", "multi_turn", "copying"):
            for label, size, found in ((DENSE, 512, dense), (SPARK, 344, outcomes([1, 1, 0, 0], 0.25))):
                rows.add(make_row(label, size, task, 1024, found, source))
                comparisons.add(*make_comparisons(label, task, 1024, found, dense, source))
    pruned = outcomes([0, 0, 0, 0], 2.0)
    rows.add(make_row(THINK, 308, "kv_list", 1024, pruned, "simulation"))
    comparisons.add(*make_comparisons(THINK, "kv_list", 1024, pruned, dense, "simulation"))
    conditions = {condition: outcomes([1, 1, 1, 0], 0.01 * number) for number, condition in enumerate(CONDITIONS)}
    comparisons.add(*compare(SPARK, "kv_list", 1024, conditions))
    ResultsFile(tmp_path / "stress.json", StressRow).add(
        StressRow("spark, ratio 0.8, 2 bits", 128, "gaussian", 88.0, 8, 0.17, 0.33, 0.01),
        StressRow("fp8 keys", 128, "gaussian", 128.0, 8, 0.03, 0.06, 0.01),
    )
    return tmp_path


def tables(results):
    files = (("results.json", Row), ("comparisons.json", Comparison), ("stress.json", StressRow))
    return Tables(*(ResultsFile(results / name, row_type).rows for name, row_type in files))


def test_every_marker_is_filled_and_the_rest_stays(results):
    names = tables(results).all()
    document = results / "accuracy.md"
    document.write_text("# Title\n" + "".join(f"text\n<!-- begin {n} -->\nold\n<!-- end {n} -->\n" for n in names))
    write_report(document, results, plots=False)
    once = document.read_text()
    assert once.startswith("# Title\ntext\n") and "old" not in once
    write_report(document, results, plots=False)
    assert document.read_text() == once


def test_markers_must_fit(results):
    with pytest.raises(ValueError, match=r"markers and tables differ: .*'unknown'"):
        fill("<!-- begin unknown -->\n<!-- end unknown -->", tables(results).all())


def test_server_table_pairs_with_dense(results):
    dense, spark, _, *pooled = tables(results).server().splitlines()[2:]
    assert pooled[-1].startswith("| spark, ratio 0.8, 2 bits | 344 | 8 | 0.500 (-0.250 ± ")
    assert dense.startswith("| dense | 512 | 0.750 | 0.750 |")
    assert "| 344 | 0.500 (-0.250 ± " in spark


def test_pooled_tables_are_over_what_every_method_was_asked(results):
    asked, _, _, _, *lines = tables(results).baselines().splitlines()
    assert asked == "4 questions of kv_list."
    assert [line.split(" | ")[0] for line in lines] == ["| dense", "| spark", "| ThinK"]
    assert "| 344 | 0.500 (-0.250 ± 0.490) | 0.25 |" in lines[1]


def test_rivals_are_pooled_over_tasks(results):
    comparisons = ResultsFile(results / "comparisons.json", Comparison)
    for task in ("kv_list", "multi_turn"):
        comparisons.add(*compare_pair(SPARK, DENSE, task, 1024, outcomes([1, 0], 0.5), outcomes([1, 1], 0.1)))
    assert "| spark, ratio 0.8, 2 bits | 344 | dense | 512 | 4 | -0.5000 ± " in tables(results).rivals()


def test_sharing_table_has_every_condition(results):
    lines = tables(results).sharing().splitlines()[2:]
    assert [line.split(" | ")[2] for line in lines] == list(CONDITIONS)
    assert "+0.0200 ± 0.0000" in lines[2]


def test_stress_table_is_ordered_by_bytes(results):
    lines = tables(results).stress_table().splitlines()
    assert lines[2].startswith("| fp8 keys | 128 | 0.030 / 0.060 |") and "88" in lines[3]


def test_pooling_weighs_by_questions():
    def part(n, mean, half):
        return Comparison("m", 0, None, "bf16", "t", 1, "kl", "dense", n, mean, mean - half, mean + half, "server")

    found = pool([part(100, 0.0, 0.2), part(300, 0.4, 0.1)])
    assert found.mean == pytest.approx(0.3) and found.n == 400
    assert 1.96 * found.se == pytest.approx(((100 * 0.2) ** 2 + (300 * 0.1) ** 2) ** 0.5 / 400)
    assert pool([]) is None and pool([None]) is None


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0, "< .0001"), (0.00012, "0.00012"), (0.0123, "0.012"), (0.5, "0.50"), (3.14159, "3.14")],
)
def test_small_numbers(number, text):
    assert small(number) == text
