"""docs/compatibility.md says what the table of refusals and the tests say."""

from __future__ import annotations

import ast

import pytest

import compatibility_matrix as matrix

TESTS = {test for section in matrix.FEATURES.values() for test in section.values()} | {matrix.REFUSAL_TEST}


@pytest.mark.parametrize("test", sorted(TESTS))
def test_named_tests_exist(test):
    file, _, name = test.partition("::")
    functions = [node.name for node in ast.parse((matrix.ROOT / file).read_text()).body if hasattr(node, "name")]
    assert name in functions


def test_the_document_is_up_to_date():
    assert matrix.DOCUMENT.read_text() == matrix.document(), "run python scripts/compatibility_matrix.py"
