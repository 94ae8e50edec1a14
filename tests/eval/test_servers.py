"""scripts/eval/servers.py: its arithmetic, and one run against servers of the bundled model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from eval import servers
from local_server import RECALL_MODEL


def _document(*places: dict[int, float], of_tokens=(-1.0,)) -> dict:
    return {"of_tokens": list(of_tokens), "likeliest": [{t: math.log(p) for t, p in place.items()} for place in places]}


def test_kl_of_what_both_list_and_of_the_rest():
    p, q = {1: 0.5, 2: 0.3, 3: 0.1}, {1: 0.4, 2: 0.3, 4: 0.2}
    figures = servers.compare_losses([_document(p)], [_document(q, of_tokens=(-1.5,))])
    expected = 0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.3)
    assert figures == {"kl": pytest.approx(expected), "loss": pytest.approx(0.5), "tokens": 1}


def test_a_cache_that_equals_dense_loses_nothing():
    place = {1: 0.7, 2: 0.2}
    assert servers.compare_losses([_document(place)], [_document(place)]) == {"kl": 0, "loss": 0, "tokens": 1}


def test_lost_is_what_dense_finds_and_the_other_does_not():
    found = {"dense": {"facts": [True, True, False]}, "spark": {"facts": [True, False, True]}}
    assert servers.summary(found, "spark")["facts"] == {"right": 2, "of": 3, "lost": 1}


def test_servers_of_the_bundled_model(tmp_path):
    output = tmp_path / "found.json"
    sizes = (
        "--servers spark --documents 1 --tokens 160 --items 1 --words 200 --tasks loss facts twice questions".split()
    )
    lines = [
        {"input": "The code for the red fox is 412 907. What is the code for the red fox?", "outputs": ["412 907"]}
    ]
    lines.append({"context": lines[0]["input"], "input": "What is the code?", "answers": ["no such thing", "412 907"]})
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sizes += ["--questions", str(tmp_path / "q.jsonl")]
    command = [sys.executable, str(Path(servers.__file__)), "--model", str(RECALL_MODEL), "-o", str(output), *sizes]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    dense, spark = json.loads(output.read_text())["rows"]
    assert dense["loss"]["kl"] == 0 and 0 < spark["loss"]["kl"] < 1
    assert spark["loss"]["tokens"] == 160 - servers.CHUNK
    assert dense["facts"]["of"] == spark["facts"]["of"] == 5
    assert dense["twice"]["right"] == 1 and dense["questions"]["right"] >= 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "questions"], "--questions None: the task questions needs a file"),
        (["--url", "http://x", "--tasks", "loss"], "--url: the task loss compares servers"),
    ],
)
def test_what_cannot_be_asked_is_refused(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["servers.py", "--model", "m", "-o", "o.json", *argv])
    with pytest.raises(SystemExit):
        servers.main()
    assert message in capsys.readouterr().err
