"""Ways to start and to ask a server, with whole keys (ratio 0): each says, token by token, what a plain dense one says.

One dense server answers everything first; the servers under test combine as many features as get along.
"""

from __future__ import annotations

import functools

import features
import pytest
import traffic
from lora_adapter import write_adapter
from servers import COMMON_FLAGS, TWO_RANKS, running, tokens_of
from variants import write_untied_model

from local_server import SGLANG_SERVE, LocalServer

# Small enough for documents to evict each other.
FLAGS = (*COMMON_FLAGS, "--max-total-tokens", "2048", "--chunked-prefill-size", "256")
LOSSLESS = ("--kv-compress", "spark", "--spark-key-ratio", "0", "--spark-value-dtype", "auto")
ASKED = (features.json_schema, features.regex, features.several_answers, features.lora, features.streaming)
SENT = (traffic.shared_prefix, traffic.more_than_the_pool, traffic.concurrent)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The dense server, and the server that has all features of a single process."""
    lora = ("--enable-lora", "--lora-backend", "torch_native")
    lora += ("--lora-paths", f"{features.ADAPTER}={write_adapter(tmp_path_factory.mktemp('lora') / 'adapter')}")
    # The model would fill a JSON answer with line breaks.
    both = (*FLAGS, *lora, "--constrained-json-disable-any-whitespace")
    pages = ("--page-size", "64", "--enable-mixed-chunk", "--radix-eviction-policy", "lfu")
    workers = ("--tokenizer-worker-num", "2")
    dense, spark = LocalServer(*both), LocalServer(*both, *LOSSLESS, *pages, *workers)
    with running(dense, spark):
        yield dense, spark


@pytest.fixture(scope="module")
def said(one_process):
    """A function from traffic to what the dense server says to it, asked once."""
    dense, _ = one_process
    return functools.cache(lambda ask: ask(dense))


@pytest.fixture(scope="module")
def server(one_process):
    return one_process[1]


@pytest.mark.parametrize("ask", ASKED, ids=lambda ask: ask.__name__)
def test_asked_in_many_ways(ask, server, said):
    assert ask(server) == said(ask)


def test_logprobs_of_prompt_and_answer(server, said):
    tokens, values = features.logprobs(server)
    expected_tokens, expected = said(features.logprobs)
    assert len(expected) > 200
    assert tokens == expected_tokens
    assert values == pytest.approx(expected, abs=2e-4)


def test_embeddings_of_a_generation_model_are_refused(server):
    assert features.embeddings_status(server) == 400
    assert server.generate("the code", max_new_tokens=1)["meta_info"]["completion_tokens"] == 1


def test_page_size_64_with_least_frequently_used_eviction(server, said):
    server.flush_cache()
    assert tokens_of(traffic.shared_prefix(server)) == tokens_of(said(traffic.shared_prefix))
    assert tokens_of(traffic.more_than_the_pool(server)) == tokens_of(said(traffic.more_than_the_pool))


def test_mixed_chunks(server, said):
    server.flush_cache()
    before = _cache(server)[0]["restored_prefix_tokens"]
    assert tokens_of(traffic.concurrent(server)) == tokens_of(said(traffic.concurrent))
    # Decoding requests that join a prefill batch attend to all their tokens as to a prefix.
    assert _cache(server)[0]["restored_prefix_tokens"] - before > 20 * 240


def test_tensor_parallel(said):
    flags = ("--tp-size", "2", "--radix-eviction-policy", "slru")
    with LocalServer(*FLAGS, *LOSSLESS, *flags, env=TWO_RANKS) as server:
        for send in SENT:
            assert tokens_of(send(server)) == tokens_of(said(send)), send.__name__
        assert server.capacity().bytes_per_token == 4 * 1 * 2 * 128 * 4


def test_data_parallel_by_sglang_serve(said):
    flags = ("--dp-size", "2", "--radix-eviction-policy", "priority")
    with LocalServer(*FLAGS, *LOSSLESS, *flags, env=TWO_RANKS, launcher=SGLANG_SERVE) as server:
        for send in SENT:
            assert tokens_of(send(server)) == tokens_of(said(send)), send.__name__
        replicas = _cache(server)
        assert len(replicas) == 2 and all(replica["rows_written"] > 1000 for replica in replicas)


def test_pipeline_parallel(said, tmp_path):
    model = write_untied_model(tmp_path / "untied")
    with LocalServer(*FLAGS, *LOSSLESS, "--pp-size", "2", model=model, env=TWO_RANKS) as server:
        for send in SENT:
            assert tokens_of(send(server)) == tokens_of(said(send)), send.__name__
        # Each stage holds two of the four layers.
        assert server.capacity().bytes_per_token == 2 * 2 * 2 * 128 * 4


def test_without_the_radix_cache(said):
    with LocalServer(*FLAGS, *LOSSLESS, "--disable-radix-cache", "--disable-overlap-schedule") as server:
        for send in SENT:
            answers = send(server)
            assert tokens_of(answers) == tokens_of(said(send)), send.__name__
        assert all(cached == 0 for _, cached in traffic.shared_prefix(server))


def test_embeddings_in_the_place_of_tokens():
    """SGLang hands them on in bfloat16, whatever the model has, and without a radix cache only."""
    flags = ("--dtype", "bfloat16", "--disable-radix-cache", "--chunked-prefill-size", "256", *LOSSLESS)
    with LocalServer(*flags, "--max-total-tokens", "2048") as server:
        assert features.input_embeds(server) == features.input_ids(server)


def _cache(server: LocalServer) -> list[dict[str, int]]:
    """What each replica reports of its compressed cache."""
    return [state["spark_kv_cache"] for state in server.info()["internal_states"]]
