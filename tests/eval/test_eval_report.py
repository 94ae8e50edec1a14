import json

import pytest

from eval import report


def result(model="m", offset=0):
    row = {"key_bytes": 48, "value_bytes": 40.0, "kl": 0.01234, "loss": -0.001, "top1": 0.95}
    rows = [{"method": "spark, small", **row, "key_bytes": 32}, {"method": "fp8_e4m3", **row}]
    settings = {"documents": 3, "prefix": 1000, "tokens": 256}
    return {"model": model, "head_dim": 64, "offset": offset, **settings, "rows": rows}


def test_the_largest_method_comes_first():
    lines = report.table(result()).splitlines()
    assert lines[2] == "| fp8_e4m3 | 48 | 40 | 88 | 0.0123 | -0.0010 | 95.0% |"
    assert lines[3].startswith("| spark, small | 32 | 40 | 72 |")


def test_results_are_in_order_of_model_and_offset(tmp_path):
    for number, of in enumerate((result("b"), result("a", 29000), result("a"))):
        (tmp_path / f"{number}.json").write_text(json.dumps(of))
    text = report.document(report.read(tmp_path))
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        "## a, head_dim 64",
        "## a, head_dim 64, positions from 29,000 on",
        "## b, head_dim 64",
    ]


def test_a_folder_without_results_says_how_to_get_some(tmp_path):
    with pytest.raises(SystemExit, match=r"offline\.py -o"):
        report.read(tmp_path)


def test_the_committed_tables_are_those_of_the_committed_results():
    found = report.read(report.FOLDER), report.read_servers(report.FOLDER)
    assert (report.FOLDER / "tables.md").read_text() == report.document(*found)


def test_servers_are_a_table_of_their_own():
    rows = [
        {"server": "dense", "loss": {"kl": 0, "loss": 0, "tokens": 9}, "facts": {"right": 4, "of": 5, "lost": 0}},
        {
            "server": "spark",
            "loss": {"kl": 0.0123, "loss": -0.004, "tokens": 9},
            "facts": {"right": 3, "of": 5, "lost": 1},
        },
    ]
    text = report.servers_table({"rows": rows})
    assert "| spark | 0.0123 | -0.0040 | 3 of 5 |" in text.splitlines()
