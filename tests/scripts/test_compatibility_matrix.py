"""docs/compatibility.md says what the table of refusals and the tests say."""

from __future__ import annotations

import ast

import pytest

import compatibility_matrix as matrix
from sglang_spark.refusals import REFUSALS

FEATURES = {name: cell for section in matrix.FEATURES.values() for name, cell in section.items()}
TESTS = {cell.test for cell in FEATURES.values() if getattr(cell, "test", None)} | {matrix.REFUSAL_TEST}


@pytest.mark.parametrize("test", sorted(TESTS))
def test_named_tests_exist(test):
    file, _, name = test.partition("::")
    functions = [node.name for node in ast.parse((matrix.ROOT / file).read_text()).body if hasattr(node, "name")]
    assert name in functions


def test_the_document_is_up_to_date():
    assert matrix.DOCUMENT.read_text() == matrix.document(), "run python scripts/compatibility_matrix.py"


def test_no_cell_is_empty():
    rows = [line for line in matrix.document().splitlines() if line.startswith("|") and not line.startswith("| |")]
    rows = [row.strip("|").split("|") for row in rows if not row.startswith(("|---", "| setting"))]
    assert len(rows) == len(FEATURES) + len(REFUSALS)
    for row in rows:
        assert len(row) == 3, row
        assert all(cell.strip() for cell in row), row
    for _, *cells in rows[: len(FEATURES)]:
        assert all(cell.strip().startswith(("works: ", "refused: ", "blocked: ")) for cell in cells), cells


def test_links_lead_somewhere():
    for test in TESTS:
        assert (matrix.DOCUMENT.parent / ".." / test.partition("::")[0]).resolve().is_file()


def test_without_a_refused_device_gpus_are_open(monkeypatch):
    rows = tuple(row for row in REFUSALS if row.setting != "--device")
    monkeypatch.setattr("sglang_spark.refusals.REFUSALS", rows)
    assert isinstance(matrix.gpu_cell(matrix.Works("a test")), matrix.Blocked)
