"""docs/compatibility.md says what the refusals say and names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from sglang_spark.refusals import REFUSALS

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "compatibility.md").read_text()


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.setting)
def test_every_refusal_is_in_the_document(refusal):
    setting = f"`{refusal.setting}`" if refusal.setting.startswith("--") else refusal.setting
    assert f"| {setting} | {refusal.why} | {refusal.instead} |" in DOCUMENT.splitlines()


def test_every_test_that_the_document_names_exists():
    named = re.findall(r"\[`(\w+)`\]\(\.\./([\w/.]+)\)", DOCUMENT)
    assert named
    for test, file in named:
        functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")}
        assert test in functions, f"{file} has no {test}"
