"""With compression on: the questions are answered, slots are shared as in the dense server, sizes add up."""

from __future__ import annotations

import pytest
import traffic
from servers import COMMON_FLAGS, running

import demo
from local_server import LocalServer
from recall_tasks import Turn, make_items

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 128
POOL_TOKENS = 8192
FLAGS = (*COMMON_FLAGS, "--max-total-tokens", str(POOL_TOKENS))
# Flags for values smaller than the model's, and the size of their rows.
SMALL_VALUES = {
    "float8_e4m3fn": (("--kv-cache-dtype", "fp8_e4m3"), HEAD_DIM),
    # 64 of integers, 8 of scales.
    "int4": (("--spark-value-dtype", "int4"), 72),
}


@pytest.fixture(scope="module")
def dense_and_spark():
    """The dense server and one with the defaults of ``--kv-compress spark``."""
    dense, spark = LocalServer(*FLAGS), LocalServer(*FLAGS, "--kv-compress", "spark")
    with running(dense, spark):
        yield dense, spark


@pytest.fixture(scope="module", params=SMALL_VALUES)
def small_values(request):
    """A name in ``SMALL_VALUES`` and a server with these, one layer of whole keys and one restore bit."""
    flags = ("--kv-compress", "spark", "--spark-dense-layers", "0", "--spark-restore-bits", "1")
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
    answers = demo.ask_in_forks(spark, item)
    assert all(turn.is_correct(answer.text) for turn, answer in zip(item.turns, answers, strict=True)), answers
    assert all(answer.cached_tokens > 800 for answer in answers), answers


SETTINGS = (
    *("kv_compress", "spark_key_ratio", "spark_restore_bits", "spark_dense_layers", "spark_value_dtype"),
    "attention_backend",
)


def test_server_info_shows_the_settings(dense_and_spark):
    dense, spark = (server.info() for server in dense_and_spark)
    assert [spark[field] for field in SETTINGS] == ["spark", 0.8, 2, "", "auto", "spark"]
    assert [dense[field] for field in SETTINGS[:5]] == ["none", 0.8, 2, "", "auto"]


def test_server_info_shows_the_settings_of_small_values(small_values):
    values, server = small_values
    info = server.info()
    value_dtype = "int4" if values == "int4" else "auto"
    assert [info[field] for field in SETTINGS] == ["spark", 0.8, 1, "0", value_dtype, "spark"]


def test_capacity_line_agrees_with_arithmetic(dense_and_spark):
    _, spark = dense_and_spark
    # 88-byte rows (32 of plane, 4 of scales, 26 kept words), float32 values.
    _check_capacity(spark, "float32", NUM_LAYERS * NUM_KV_HEADS * (88 + 4 * HEAD_DIM))


def test_capacity_line_agrees_with_arithmetic_for_small_values(small_values):
    values, server = small_values
    # One layer of float32 keys, three of 72-byte rows (16 of plane, 4 of scales, 26 kept words).
    keys = 4 * HEAD_DIM + 3 * 72
    _check_capacity(server, values, NUM_KV_HEADS * (keys + NUM_LAYERS * SMALL_VALUES[values][1]))


def _check_capacity(server: LocalServer, values: str, bytes_per_token: int) -> None:
    capacity = server.capacity()
    dense_bytes = NUM_LAYERS * NUM_KV_HEADS * 2 * HEAD_DIM * 4
    assert capacity.value_dtype == values
    assert (capacity.bytes_per_token, capacity.dense_bytes_per_token) == (bytes_per_token, dense_bytes)
    dense_tokens = POOL_TOKENS * bytes_per_token // dense_bytes
    assert (capacity.tokens, capacity.dense_tokens) == (POOL_TOKENS, dense_tokens)
