"""docs/models.md is what the doctor says now."""

from __future__ import annotations

import pytest

import model_table


@pytest.fixture(autouse=True)
def plugins():
    from sglang.srt.plugins import load_plugins

    load_plugins()


def test_the_document_is_up_to_date():
    text = model_table.DOCUMENT.read_text()
    assert model_table.fill(text, {"models": model_table.table()}) == text, "run python scripts/model_table.py"
