"""The parts of scripts/load_bench that need no server."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer

from load_bench import budget, client, report
from load_bench.budget import BudgetMissed, Capacity, pool_bytes
from load_bench.client import Answer
from load_bench.conversations import Request, Shape, make_requests
from load_bench.counters import Counters, Counts
from load_bench.random_traffic import RandomTraffic
from load_bench.servers import make_dummy_model, model_flags, model_folder
from load_bench.workloads import BENCH_SERVING, MULTI_TURN, summarize
from local_server import RECALL_MODEL

SHAPE = Shape(users=3, turns=4, system_len=40, document_len=120, reply_len=8, seed=0)


def test_the_dummy_model_has_llamas_shape_and_a_word_per_token(tmp_path):
    make_dummy_model(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.decode([0, 17, config.vocab_size - 1]).split() == ["t0", "t17", f"t{config.vocab_size - 1}"]
    assert tokenizer.eos_token_id == config.eos_token_id


def test_model_by_device():
    with model_folder(None, "cpu") as on_cpu, model_folder("x", "cuda") as given, model_folder(None, "cuda") as dummy:
        assert (on_cpu, given) == (str(RECALL_MODEL), "x")
        assert Path(dummy, "config.json").exists()
    assert not Path(dummy).exists()
    assert model_flags(None, "cuda", 3) == ("--random-seed", "3", "--load-format", "dummy")
    assert model_flags("x", "cuda", 3) == ("--random-seed", "3")
    assert model_flags(None, "cpu", 3) == ("--random-seed", "3", "--device", "cpu")


def test_every_random_request_is_as_long_as_asked_for(tmp_path):
    traffic = RandomTraffic(7, input_len=4096, output_len=512, seed=0, max_concurrency=3)
    command = traffic.command("http://x", "model", tmp_path / "y")
    line = " ".join(command)
    assert command[1:3] == ["-m", "sglang.bench_serving"]
    for option in ("--num-prompts 7", "--max-concurrency 3", "--random-input-len 4096", "--random-output-len 512"):
        assert option in line
    assert "--random-range-ratio 1.0" in line and "--dataset-name random-ids --tokenize-prompt" in line


@pytest.fixture(scope="module", params=["text", "random ids"])
def requests(request, tmp_path_factory) -> list[Request]:
    tokenizer = AutoTokenizer.from_pretrained(RECALL_MODEL)
    if request.param == "random ids":
        tokenizer.chat_template = None
    return make_requests(tokenizer, SHAPE)


def test_every_user_speaks_once_a_round(requests):
    rounds = [requests[start : start + SHAPE.users] for start in range(0, len(requests), SHAPE.users)]
    assert [{request.turn for request in spoken} for spoken in rounds] == [{0}, {1}, {2}, {3}]
    assert all({request.user for request in spoken} == {0, 1, 2} for spoken in rounds)
    assert len({tuple(request.user for request in spoken) for spoken in rounds}) > 1


def test_prompts_share_the_system_prompt_and_grow_by_a_turn(requests):
    prompts = {(request.user, request.turn): request.input_ids for request in requests}
    for user in range(SHAPE.users):
        for turn in range(1, SHAPE.turns):
            before, now = prompts[user, turn - 1], prompts[user, turn]
            assert now[: len(before)] == before and len(now) > len(before)
    first = zip(*(prompts[user, 0] for user in range(SHAPE.users)), strict=False)
    shared = next(index for index, ids in enumerate(first) if len(set(ids)) > 1)
    assert 0.5 * SHAPE.system_len <= shared < SHAPE.system_len + 20
    assert len(prompts[0, 0]) == pytest.approx(SHAPE.system_len + SHAPE.document_len, rel=0.5)


def test_the_same_seed_gives_the_same_traffic_and_another_one_other_traffic():
    tokenizer = AutoTokenizer.from_pretrained(RECALL_MODEL)
    requests = make_requests(tokenizer, SHAPE)
    assert make_requests(tokenizer, SHAPE) == requests
    assert make_requests(tokenizer, dataclasses.replace(SHAPE, seed=1)) != requests


def test_turns_wait_for_the_answer_before_and_no_more_run_than_allowed(requests, monkeypatch):
    under_way, most, finished = set(), [], set()

    async def ask(session, url, request, reply_len):
        assert request.turn == 0 or (request.user, request.turn - 1) in finished
        under_way.add(request.user)
        most.append(len(under_way))
        await asyncio.sleep(0.001 * (1 + request.user))
        under_way.remove(request.user)
        finished.add((request.user, request.turn))
        return Answer(text=f"{request.user}/{request.turn}")

    monkeypatch.setattr(client, "_ask", ask)
    answers, seconds = client.send("http://x", requests, reply_len=8, concurrency=2)
    assert [answer.text for answer in answers] == [f"{request.user}/{request.turn}" for request in requests]
    assert max(most) == 2 and seconds > 0


def test_a_server_that_is_not_there_gives_errors_and_no_exception(requests):
    answers, _ = client.send("http://127.0.0.1:9", requests[:2], reply_len=8, concurrency=2)
    assert all("Connect" in answer.error and answer.completion_tokens == 0 for answer in answers)


def test_an_answer_cut_short_is_an_error():
    meta = {"prompt_tokens": 9, "cached_tokens": 4, "completion_tokens": 8, "num_retractions": 1, "finish_reason": None}
    answer = client._answer({"text": "x", "meta_info": meta}, 8, 0.1, 0.2)
    assert answer == Answer(None, "x", 9, 4, 8, 1, 0.1, 0.2)
    assert client._answer({"text": "x", "meta_info": meta}, 9, 0.1, 0.2).error == "8 of 9 tokens: None"
    assert client._answer({"error": {"message": "no"}}, 8, 0.1, 0.2).error == "{'message': 'no'}"
    assert client._answer(None, 8, 0.0, 0.2).error == "None"


def _row(server: str, workload: str = MULTI_TURN, **changes) -> dict:
    about = {"server": server, "pool_tokens": 6144, "pool_bytes": 25169920}
    requests = make_requests(AutoTokenizer.from_pretrained(RECALL_MODEL), SHAPE)[:2]
    answers = [Answer(None, f"{requests[0].expected.answer}<|end|>x", 100, 60, 8, 1, 0.5, 2.0), Answer(error="lost")]
    return about | summarize(requests, answers, 4.0, Counts(1, 700, 5), "<|end|>") | {"workload": workload} | changes


def test_what_is_kept_of_a_workload():
    row = _row("dense")
    assert (row["requests"], row["completed"], row["errors"], row["right"]) == (2, 1, ["lost"], 0.5)
    assert (row["hit_rate"], row["retractions"], row["evicted_tokens"], row["peak_running"]) == (0.6, 1, 700, 5)
    assert (row["output_throughput"], row["request_throughput"]) == (2.0, 0.25)
    assert (row["ttft_p50_ms"], row["latency_p99_ms"]) == (500.0, 2000.0)


def test_an_answer_after_the_end_of_text_does_not_count():
    requests = make_requests(AutoTokenizer.from_pretrained(RECALL_MODEL), SHAPE)[:1]
    late = Answer(text=f"I do not know.<|end|>{requests[0].expected.answer}", prompt_tokens=1)
    assert summarize(requests, [late], 1.0, Counts(0, 0, 1), "<|end|>")["right"] == 0
    without = [dataclasses.replace(request, expected=None) for request in requests]
    assert summarize(without, [late], 1.0, Counts(0, 0, 1), "<|end|>")["right"] is None


def test_tables_and_page(tmp_path):
    rows = [_row("dense"), _row("spark", hit_rate=0.75), _row("dense", BENCH_SERVING, right=None)]
    console = Console(width=250, record=True, file=Path(os.devnull).open("w"))
    console.print(*report.make_tables(rows))
    text = console.export_text()
    assert "multi-turn, 2 requests" in text and "75.0%" in text and "6,144" in text
    page = tmp_path / "load.md"
    page.write_text("".join(f"<!-- begin {n} -->old<!-- end {n} -->" for n in ("about", MULTI_TURN, BENCH_SERVING)))
    report.write_page(page, rows, {"device": "a CPU"})
    written = page.read_text()
    assert "* device: a CPU" in written and "old" not in written
    assert (
        "| spark | 24.004 | 6,144 | 1 | 50.0% | 75.0% | 1 | 700 | 5 | 2.0 | 0.2 | 0.50 | 0.50 | 2.00 | 2.00 |"
        in written
    )
    tables = report.make_markdown(rows)
    assert "right answers" in tables[MULTI_TURN] and "right answers" not in tables[BENCH_SERVING]
    with pytest.raises(ValueError, match=BENCH_SERVING):
        report.write_page(page, rows[:2], {})


def test_a_plot_has_the_same_bytes_for_the_same_rows(tmp_path):
    for name in ("a.png", "b.png"):
        report.plot(tmp_path / name, [_row("dense"), _row("spark", right=None, hit_rate=None)], "title")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


class _Server:
    """What the budget and the counters ask a server."""

    def __init__(self, **metrics: float):
        self.values = {"sglang:" + name: value for name, value in metrics.items()}
        self.text = "Decode batch, #running-req: 9"

    def info(self):
        return {"page_size": 16, "max_total_num_tokens": 6144}

    def metrics(self):
        return dict(self.values)

    def log(self):
        return self.text


def test_the_doctor_is_asked_once_for_what_it_answers_at_once(monkeypatch):
    asked = []

    def diagnose(model, flags, budget_mib):
        asked.append(flags)
        size = 1280 if "int3" in flags else 2752
        return {
            "tokens": {"dense": 8, "dense_fp8": 16, "spark": 2**15 // size},
            "bytes_per_token": {"dense": 4096, "dense_fp8": 2048, "spark": size},
        }

    monkeypatch.setattr(budget, "_diagnose", diagnose)
    names = ["dense", "dense-fp8", "spark", "spark-small"]
    found = budget.capacities(names, "model", ["--seed", "0"], 1 / 32)
    assert list(found) == names and len(asked) == 2 and all(flags[:2] == ["--seed", "0"] for flags in asked)
    assert (found["dense"], found["dense-fp8"]) == (Capacity(8, 4096), Capacity(16, 2048))
    assert (found["spark"], found["spark-small"]) == (Capacity(11, 2752), Capacity(25, 1280))


def test_a_pool_is_the_budget_and_one_page_at_most():
    right = _Server(kv_cache_memory_usage_gb=(6144 + 16) * 4096 / 2**30)
    assert pool_bytes(right, Capacity(6144, 4096), 24) == (6144 + 16) * 4096
    with pytest.raises(BudgetMissed, match=r"asked for 6144 tokens in 24 MiB, the server has 6144 in 24\.066 MiB"):
        pool_bytes(_Server(kv_cache_memory_usage_gb=(6144 + 17) * 4096 / 2**30), Capacity(6144, 4096), 24)
    with pytest.raises(BudgetMissed, match="asked for 9144 tokens"):
        pool_bytes(right, Capacity(9144, 2752), 24)


def test_counters_count_from_their_start():
    server = _Server(num_retracted_requests_total=2)
    counters = Counters(server)
    server.values |= {"sglang:num_retracted_requests_total": 5.0, "sglang:evicted_tokens_total": 70.0}
    server.text += "\nPrefill batch, #running-req: 3, x\nDecode batch, #running-req: 4, x"
    assert counters.counts() == Counts(retractions=3, evicted_tokens=70, peak_running=4)
