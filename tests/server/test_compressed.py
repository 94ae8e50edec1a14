"""With compression on: the questions are answered, slots are shared as in the dense server, sizes add up."""

from __future__ import annotations

import re

import pytest
import traffic
from servers import COMMON_FLAGS, running

import frontend_fork_join
import multi_turn_chat
import openai_streaming
from local_server import LocalServer
from recall_tasks import Turn, make_items

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 128
POOL_TOKENS = 8192
FLAGS = (*COMMON_FLAGS, "--max-total-tokens", str(POOL_TOKENS))
# Flags for values smaller than the model's, and the size of their rows.
SMALL_VALUES = {
    "float8_e4m3fn": (("--spark-value-dtype", "auto", "--kv-cache-dtype", "fp8_e4m3"), HEAD_DIM),
    # 48 of integers, 2 of a scale, 6 of zeros.
    "int3": (("--spark-value-dtype", "int3"), 56),
}


@pytest.fixture(scope="module")
def dense_and_spark():
    """The dense server and one with the defaults of ``--kv-compress spark``."""
    dense, spark = LocalServer(*FLAGS), LocalServer(*FLAGS, "--kv-compress", "spark", "--enable-metrics")
    with running(dense, spark):
        yield dense, spark


@pytest.fixture(scope="module", params=SMALL_VALUES)
def small_values(request):
    """A name in ``SMALL_VALUES`` and a server with these, one layer of whole keys and 2 bits for the others."""
    flags = ("--kv-compress", "spark", "--spark-dense-layers", "0", "--spark-restore-bits", "2")
    server = LocalServer(*FLAGS, *flags, *SMALL_VALUES[request.param][0])
    with running(server):
        yield request.param, server


def _replies(server: LocalServer, kind: str, count: int) -> list[tuple[Turn, str]]:
    """Each item's questions in a chat of its own, going on from the expected answers."""
    replies = []
    for item in make_items(kind, seed=21, count=count, target_tokens=900):
        for turn, asked in enumerate(item.turns):
            reply, _ = traffic.complete_chat(server, item.messages(turn), max_tokens=32)
            replies.append((asked, reply))
    return replies


@pytest.mark.parametrize(
    ("kind", "may_lose"), [("single_needle", 0), ("multi_needle", 0), ("kv_list", 0), ("multi_turn", 1)]
)
def test_recall_questions_are_answered(kind, may_lose, dense_and_spark):
    """multi_turn asks for several facts under one key, where the dense cache too is right by a narrow margin."""
    dense, spark = (_replies(server, kind, count=4) for server in dense_and_spark)
    right = [turn.is_correct(reply) for turn, reply in dense]
    assert sum(right) >= 0.75 * len(right), f"the dense server itself is wrong too often: {dense}"
    lost = [
        (turn, reply)
        for was_right, (turn, reply) in zip(right, spark, strict=True)
        if was_right and not turn.is_correct(reply)
    ]
    assert len(lost) <= may_lose, lost


def test_recall_questions_are_answered_with_small_values(small_values):
    _, server = small_values
    replies = _replies(server, "multi_needle", count=4)
    assert all(turn.is_correct(reply) for turn, reply in replies), replies


@pytest.mark.parametrize(
    "conversation", [traffic.shared_prefix, traffic.scripted_chat], ids=lambda function: function.__name__
)
def test_cached_tokens_equal_the_dense_server(conversation, dense_and_spark):
    dense, spark = dense_and_spark
    for server in dense_and_spark:
        server.flush_cache()
    assert [cached for _, cached in conversation(dense)] == [cached for _, cached in conversation(spark)]


def test_two_users_share_the_slots_of_their_system_prompt(dense_and_spark):
    _, spark = dense_and_spark
    spark.flush_cache()
    (_, first), _, (_, second), _ = traffic.two_users(spark)
    assert first < 10
    assert second > 350


def test_a_frontend_program_forks_from_shared_slots(dense_and_spark):
    _, spark = dense_and_spark
    item = make_items("multi_needle", seed=22, count=1, target_tokens=900, questions=4)[0]
    answers = frontend_fork_join.ask_in_forks(spark.url, item)
    assert all(turn.is_correct(answer.text) for turn, answer in zip(item.turns, answers, strict=True)), answers
    assert all(answer.cached_tokens > 800 for answer in answers), answers


@pytest.mark.parametrize("example", [frontend_fork_join, multi_turn_chat], ids=lambda example: example.__name__)
def test_examples_answer_from_the_cache(example, dense_and_spark, capsys):
    _, spark = dense_and_spark
    spark.flush_cache()
    example.main(["--url", spark.url])
    cached = [int(number) for number in re.findall(r"\[(\d+) of \d+ cached\]", capsys.readouterr().out)]
    assert len(cached) == 4 and all(number > 800 for number in cached[1:]), cached


def test_the_streaming_example_prints_the_answer(dense_and_spark, capsys):
    _, spark = dense_and_spark
    openai_streaming.main(["--url", spark.url + "/"])
    turn = make_items("single_needle", seed=11, count=1, target_tokens=900)[0].turns[0]
    question, answer = capsys.readouterr().out.strip().split("\n")
    assert question == turn.question and turn.is_correct(answer)


SETTINGS = (
    *("kv_compress", "spark_key_ratio", "spark_restore_bits", "spark_dense_layers", "spark_value_dtype"),
    "attention_backend",
)


def test_server_info_shows_the_settings(dense_and_spark):
    dense, spark = (server.info() for server in dense_and_spark)
    assert [spark[field] for field in SETTINGS] == ["spark", 0.96, None, "", "int4", "spark"]
    assert dense.keys().isdisjoint(SETTINGS[:5])


def test_metrics_and_server_info_follow_the_traffic(dense_and_spark):
    _, spark = dense_and_spark
    spark.flush_cache()
    before = _counts(spark)
    answers = [spark.generate(prompt, max_new_tokens=8) for prompt in _prompts_with_a_common_prefix()]
    after = _counts(spark)
    info = [answer["meta_info"] for answer in answers]
    cached = sum(answer["cached_tokens"] for answer in info)
    # The last token of an answer is never fed back; the overlap scheduler may run one step more per request.
    written = sum(answer["prompt_tokens"] + answer["completion_tokens"] - 1 for answer in info) - cached
    assert cached > 300
    assert after["restored_prefix_tokens"] - before["restored_prefix_tokens"] == cached
    assert written <= after["rows_written"] - before["rows_written"] <= written + len(answers)

    published = spark.metrics()
    capacity = spark.capacity()
    assert published["sglang:spark_bytes_per_token"] == capacity.bytes_per_token == after["bytes_per_token"]
    assert published["sglang:spark_dense_bytes_per_token"] == capacity.dense_bytes_per_token
    assert published["sglang:spark_kept_key_channels"] == 6
    held = published["sglang:kv_used_tokens"] + published["sglang:kv_evictable_tokens"]
    saved_per_token = capacity.dense_bytes_per_token - capacity.bytes_per_token
    assert published["sglang:spark_saved_bytes"] == held * saved_per_token > 0
    # Published at the last prefill; decode has gone on since.
    assert before["rows_written"] < published["sglang:spark_rows_written_total"] <= after["rows_written"]
    assert published["sglang:spark_restored_prefix_tokens_total"] == after["restored_prefix_tokens"]


def _prompts_with_a_common_prefix() -> list[str]:
    item = make_items("multi_turn", seed=23, count=1, target_tokens=400, questions=2)[0]
    return [f"{item.document}\nQuestion: {turn.question}\nAnswer:" for turn in item.turns]


def _counts(server: LocalServer) -> dict[str, int]:
    return server.info()["internal_states"][0]["spark_kv_cache"]


def test_server_info_shows_the_settings_of_small_values(small_values):
    values, server = small_values
    info = server.info()
    value_dtype = "int3" if values == "int3" else "auto"
    assert [info[field] for field in SETTINGS] == ["spark", 0.96, 2, "0", value_dtype, "spark"]


def test_capacity_line_agrees_with_arithmetic(dense_and_spark):
    _, spark = dense_and_spark
    # Keys of 64 bytes (48 of planes, 4 of scales, 6 kept words), values of 72 (64 of integers, 2 of a scale, zeros).
    _check_capacity(spark, "int4", NUM_LAYERS * NUM_KV_HEADS * (64 + 72))


def test_capacity_line_agrees_with_arithmetic_for_small_values(small_values):
    values, server = small_values
    # One layer of float32 keys, three of 48-byte rows (32 of planes, 4 of scales, 6 kept words).
    keys = 4 * HEAD_DIM + 3 * 48
    _check_capacity(server, values, NUM_KV_HEADS * (keys + NUM_LAYERS * SMALL_VALUES[values][1]))


def _check_capacity(server: LocalServer, values: str, bytes_per_token: int) -> None:
    capacity = server.capacity()
    dense_bytes = NUM_LAYERS * NUM_KV_HEADS * 2 * HEAD_DIM * 4
    assert capacity.value_dtype == values
    assert (capacity.bytes_per_token, capacity.dense_bytes_per_token) == (bytes_per_token, dense_bytes)
    dense_tokens = POOL_TOKENS * bytes_per_token // dense_bytes
    assert (capacity.tokens, capacity.dense_tokens) == (POOL_TOKENS, dense_tokens)
