"""scripts/soak.py without servers: programs, what counts as a failure, smaller programs, arguments and output."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

import soak
from soaking.comparison import compare, failures, foreign_codes, recall
from soaking.execution import Outcome, Transcript
from soaking.generation import OVERLONG, make_program, shrink, smaller
from soaking.malformed import MALFORMED
from soaking.programs import Document, Excerpt, Fate, Program, Request, Wave, codes_in

ASKED = Request(Excerpt(0, 4), question=0, via="generate", max_new_tokens=24)
ABORTED = replace(ASKED, via="stream", fate=Fate("abort", tokens=2))
CONTINUED = replace(ASKED, source=0)
DOCUMENTS = (Document("kv_list", 1, 240), Document("kv_list", 2, 240))
PROGRAM = Program(DOCUMENTS, (Wave((ASKED, ABORTED), ("no JSON",)), Wave((CONTINUED,))))
ANSWER = Outcome("answered", ("a b c",), ((1, 2, 3),), 200)
SAID = Transcript([ANSWER, Outcome("cut", ("a b",), ((1, 2),), 200), ANSWER], [Outcome("refused", http_status=400)])
MANY = [make_program(5, number) for number in range(60)]


def changed(number: int, **fields) -> Transcript:
    """What `SAID` says, but for one outcome."""
    outcomes = list(SAID.outcomes)
    outcomes[number] = replace(outcomes[number], **fields)
    return replace(SAID, outcomes=outcomes)


def size(program: Program) -> int:
    """Parts that can be left out."""
    return len(program.requests()) + sum(1 + bool(wave.malformed) + wave.flush for wave in program.waves)


def test_programs_have_every_kind_of_step():
    requests = [request for program in MANY for request in program.requests()]
    assert {request.fate.kind for request in requests} == {"finish", "abort", "disconnect", "timeout"}
    assert {request.via for request in requests} == {"generate", "stream", "chat"}
    assert {request.copies for request in requests} == {1, 2}
    assert {request.source.quarters for request in requests if isinstance(request.source, Excerpt)} == {1, 2, 3, 4}
    assert any(request.max_new_tokens == OVERLONG for request in requests)
    waves = [wave for program in MANY for wave in program.waves]
    assert {name for wave in waves for name in wave.malformed} == set(MALFORMED)
    assert any(wave.flush for wave in waves)
    assert any(all(request.max_new_tokens >= 100 for request in wave.requests) for wave in waves)
    branches = [Counter(r.source for r in program.requests() if isinstance(r.source, int)) for program in MANY]
    assert any(count > 1 for counter in branches for count in counter.values())


def test_a_program_is_a_function_of_its_numbers():
    assert make_program(5, 7) == MANY[7] != MANY[8]


def test_conversations_continue_answers_of_earlier_waves():
    for program in MANY:
        number = 0
        for wave in program.waves:
            sources = [request.source for request in wave.requests if isinstance(request.source, int)]
            assert all(source < number for source in sources)
            assert all(program.requests()[source].fate.kind == "finish" for source in sources)
            number += len(wave.requests)


def test_a_program_is_read_back_as_it_was_written():
    assert [Program.from_json(program.to_json()) for program in MANY] == MANY


def test_excerpts_share_prefixes():
    texts = [
        Program(DOCUMENTS, (Wave((replace(ASKED, source=Excerpt(1, quarters)),)),)).text(0) for quarters in (1, 2, 4)
    ]
    assert texts[2].startswith(texts[1]) and texts[1].startswith(texts[0]) and len(set(texts)) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fate": Fate("abort")}, "fate=abort needs via=stream, got via=generate"),
        ({"fate": Fate("disconnect")}, "fate=disconnect needs via=stream, got via=generate"),
        ({"via": "chat", "copies": 2}, "copies=2 needs via=generate, got via=chat"),
    ],
)
def test_requests_that_cannot_be_sent_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(ASKED, **fields)


def test_the_same_answers_are_no_difference():
    assert compare(PROGRAM, SAID, SAID) == ([], 2)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (
            changed(0, ids=((1, 2, 4),), texts=("a b d",)),
            "request 0 says ('a b d',) instead of ('a b c',), from token 2",
        ),
        (changed(1, ids=((1, 3),)), "request 1 begins with (1, 3) instead of (1, 2)"),
        (changed(0, status="refused", http_status=400), "request 0 was refused (400) instead of answered (200)"),
        (changed(0, status="hung", detail="timeout"), "request 0 was hung: timeout"),
        (changed(2, status="lost", detail="reset"), "request 2 was lost: reset"),
        (replace(SAID, malformed=[Outcome("refused", http_status=500)]), "status 500 instead of 400"),
        (replace(SAID, malformed=[Outcome("answered", http_status=200)]), "was answered"),
        (replace(SAID, errors=["the cache was not flushed"]), "the cache was not flushed"),
    ],
)
def test_whatever_changes_is_a_difference(got, message):
    assert any(message in difference for difference in compare(PROGRAM, SAID, got).differences)


def test_an_answer_that_was_cut_may_end_anywhere():
    longer = changed(1, ids=((1, 2, 3, 4),), texts=("a b c d",))
    assert compare(PROGRAM, SAID, longer) == compare(PROGRAM, longer, SAID) == ([], 2)


def test_what_follows_an_answer_that_was_cut_is_not_compared():
    cut = changed(0, status="cut", ids=((1,),), texts=("a",))
    other = replace(cut, outcomes=[*cut.outcomes[:2], replace(ANSWER, texts=("x",), ids=((9,),))])
    assert compare(PROGRAM, SAID, other) == ([], 0)
    lost = replace(other, outcomes=[*other.outcomes[:2], Outcome("lost")])
    assert compare(PROGRAM, SAID, lost).differences == failures(lost) == ["request 2 was lost: "]


def test_an_answer_with_another_documents_number_is_found():
    own, other = (
        codes_in(Program(DOCUMENTS, (Wave((replace(ASKED, source=Excerpt(document, 4)),)),)).text(0))
        for document in (0, 1)
    )
    code = min(other - own)
    prompt = PROGRAM.text(0)
    assert foreign_codes(PROGRAM, changed(0, texts=(f"Item: {min(own)}.",), prompt=prompt)) == []
    assert foreign_codes(PROGRAM, changed(0, texts=(f"Item: {code}.",), prompt=f"{prompt} {code}")) == []
    leaked = foreign_codes(PROGRAM, changed(0, texts=("fine", f"Item: {code}."), prompt=prompt))
    assert leaked == [f"request 0 says ['{code}'], which it was not told"]


def test_recall_counts_questions_that_could_be_answered():
    turn = PROGRAM.item(0).turns[0]
    assert recall(PROGRAM, SAID) == (0, 2)
    assert recall(PROGRAM, changed(0, texts=(turn.answer,))) == (1, 2)
    parts = [Program(DOCUMENTS, (Wave((replace(ASKED, source=Excerpt(0, 1), question=n),)),)) for n in range(4)]
    untold = next(part for n, part in enumerate(parts) if part.item(0).turns[n].answer not in part.text(0))
    assert recall(untold, Transcript([ANSWER])) == (0, 0)


def test_smaller_programs_lack_a_part_and_can_be_run():
    for program in MANY[:10]:
        for candidate in smaller(program):
            assert size(candidate) < size(program)
            assert all(
                request.source < number
                for number, request in enumerate(candidate.requests())
                if isinstance(request.source, int)
            )


def test_the_smallest_failing_program_is_found():
    program = next(
        p for p in MANY if any(r.fate.kind == "disconnect" and isinstance(r.source, int) for r in p.requests())
    )
    tried = []

    def fails(candidate: Program) -> bool:
        tried.append(candidate)
        return any(r.fate.kind == "disconnect" and isinstance(r.source, int) for r in candidate.requests())

    smallest = shrink(program, fails, max_tries=500)
    kinds = [request.fate.kind for request in smallest.requests()]
    assert kinds[-1] == "disconnect" and len(kinds) <= 3 and not any(wave.malformed for wave in smallest.waves)
    assert len(tried) <= 500
    assert shrink(program, fails, max_tries=0) == program


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--servers", "lossless"], "--servers lossless: dense is what the others are compared with"),
        (["--programs", "0"], "--programs must be positive, got 0"),
        (["--minutes", "-1"], "--minutes must be positive, got -1.0"),
        (["--request-limit", "0"], "--request-limit must be positive, got 0"),
        (["--shrink", "-1"], "--shrink must not be negative, got -1"),
        (["--minutes", "1", "--programs", "1"], "not allowed with argument"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        soak.parse_arguments(argv)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_without_an_extent_it_runs_five_minutes():
    assert soak.parse_arguments([]).minutes == 5
    assert soak.parse_arguments(["--", "--page-size", "16"]).server_args == ["--page-size", "16"]


class FakeFleet:
    """Fails on programs that abort a request."""

    def __init__(self, servers=None):
        self.totals = Counter()
        self.recalled = {name: Counter(right=99, total=100) for name in ("dense", "compressed")}
        self.examined = []

    def examine(self, program):
        self.totals["programs"] += 1
        self.examined.append(program)
        return ["lossless: wrong"] if any(r.fate.kind == "abort" for r in program.requests()) else []

    def is_running(self):
        return True

    def counters(self):
        return {"dense": dict.fromkeys(soak.COUNTERS, 1), "compressed": dict.fromkeys(soak.COUNTERS, 2)}


@pytest.fixture
def fake_servers(monkeypatch):
    fleets = []
    monkeypatch.setattr(soak, "make_server", lambda name, flags, request_limit_s: SimpleNamespace())
    monkeypatch.setattr(soak, "running", lambda servers: nullcontext())
    monkeypatch.setattr(soak, "Fleet", lambda servers: fleets.append(FakeFleet()) or fleets[-1])
    return fleets


def test_a_failure_is_written_and_can_be_replayed(fake_servers, tmp_path, capsys):
    failure, summary = tmp_path / "failure.json", tmp_path / "soak.json"
    argv = ["--programs", "50", "--seed", "5", "--shrink", "200", "--failure", str(failure), "--json", str(summary)]
    assert soak.main(argv) == 1
    program = Program.from_json(failure.read_text())
    assert [request.fate.kind for request in program.requests()].count("abort") == 1
    assert len(program.requests()) <= 2
    assert json.loads(summary.read_text())["problems"] == ["lossless: wrong"]
    assert "lossless: wrong" in capsys.readouterr().out
    assert soak.main(["--replay", str(failure), "--failure", str(tmp_path / "again.json")]) == 1
    assert fake_servers[-1].examined == [program]


def test_the_compressed_server_may_not_forget(fake_servers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(FakeFleet, "examine", lambda self, program: self.totals.update(programs=1) or [])
    assert soak.main(["--programs", "2"]) == 0
    assert fake_servers[-1].totals["programs"] == 2
    monkeypatch.setattr(soak, "LOST_RECALL", -0.5)
    assert soak.main(["--programs", "1"]) == 1
    assert "compressed: 0.990 right, dense 0.990" in capsys.readouterr().out


def test_time_is_up(monkeypatch):
    progress = soak.Progress(FakeFleet(), Console(quiet=True), minutes=1.0, count=None)
    assert not progress.is_over()
    monkeypatch.setattr(progress, "_begin", progress._begin - 61)
    assert progress.is_over()
