"""Requests and schedules that move slots about in unusual ways, with whole keys: tokens and logprobs as dense.

The server under test has all settings of SGLang that change in what order slots are written, shared and given back, and
get along: small chunks, forced retraction, mixed batches, the longest prefix first.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import traffic
from servers import COMMON_FLAGS, running
from variants import write_model_of_other_weights

from local_server import RECALL_MODEL, LocalServer

FLAGS = (*COMMON_FLAGS, "--max-total-tokens", "2048")
LOSSLESS = ("--kv-compress", "spark", "--spark-key-ratio", "0", "--spark-value-dtype", "auto")
SMALL_CHUNKS = ("--chunked-prefill-size", "64", "--enable-mixed-chunk", "--num-continuous-decode-steps", "2")
SMALL_CHUNKS += ("--strip-thinking-cache",)
ORDERS = ("--schedule-policy", "lpm", "--prefill-max-requests", "3", "--prefill-decode-interval", "2")
# SGLang retracts requests every few steps, whether or not the pool is full.
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
BEAMS = {"temperature": 0, "max_new_tokens": 12, "beam_width": 3, "n": 3}
STREAMED = 150


@pytest.fixture(scope="module")
def servers():
    dense = LocalServer(*FLAGS)
    spark = LocalServer(*FLAGS, *LOSSLESS, *SMALL_CHUNKS, *ORDERS, env=RETRACT)
    with running(dense, spark):
        yield dense, spark


@pytest.mark.parametrize("send", [traffic.concurrent, traffic.more_than_the_pool, traffic.aborts])
def test_same_tokens_under_retraction_and_mixed_batches(send, servers):
    dense, spark = servers
    assert _tokens(send(spark)) == _tokens(send(dense))
    spark.log_line("Testing retraction")


def test_logprobs_from_anywhere_around_a_cached_prefix(servers):
    prompt = traffic.make_items("single_needle", seed=51, count=1, target_tokens=200)[0].plain_prompt()
    for server in servers:
        cached, length = (
            server.generate(text, max_new_tokens=1)["meta_info"]["prompt_tokens"]
            for text in (prompt[: len(prompt) // 2], prompt)
        )
    for start in (-1, 0, 1, cached - 1, cached, cached + 1, length - 2, length - 1):
        (tokens, expected), (spark_tokens, values) = (_logprobs(server, prompt, start) for server in servers)
        assert spark_tokens == tokens, start
        assert values == pytest.approx(expected, abs=2e-4), start


def test_beams(servers):
    """Of prompts within one chunk: longer ones end SGLang's scheduler."""
    prompt = "the code for red falcon is"
    expected, said = (server.generate(prompt, sampling_params=BEAMS) for server in servers)
    assert _beams(said) == _beams(expected)
    assert len(set(_beams(expected))) == 3


def test_weights_change_beside_streams_and_cached_prefixes(servers, tmp_path):
    """The update waits for the streams, which say what they would have said; then no old prefix is read."""
    other = write_model_of_other_weights(tmp_path / "other")
    before = [_updated_beside_a_stream(server, other) for server in servers]
    after = [traffic.shared_prefix(server) for server in servers]
    again = [_updated_beside_a_stream(server, RECALL_MODEL) for server in servers]
    assert before[0] == before[1] and again[0] == again[1]
    assert before[0] != again[0] and len(before[0]) == STREAMED
    assert _tokens(after[0]) == _tokens(after[1]) != _tokens(traffic.shared_prefix(servers[1]))


def _updated_beside_a_stream(server: LocalServer, model: Path) -> list[int]:
    """Tokens of a stream during which the server was told to load ``model``, over a prefix that it had cached."""
    traffic.shared_prefix(server)
    prompt = traffic.make_items("single_needle", seed=52, count=1, target_tokens=200)[0].plain_prompt()
    sampling = {"temperature": 0, "max_new_tokens": STREAMED, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        body = {"text": prompt, "stream": True, "sampling_params": sampling}
        with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=120) as stream:
            lines = stream.iter_lines()
            last = next(lines)
            update = pool.submit(
                requests.post,
                f"{server.url}/update_weights_from_disk",
                # Flushed below: SGLang ends a scheduler that cannot flush yet, as just after a stream's last token.
                json={"model_path": str(model), "load_format": "auto", "flush_cache": False},
                timeout=120,
            )
            for line in lines:
                last = line if line.startswith(b"data: {") else last
        assert update.result().json()["success"], update.result().text
    _flush(server)
    return json.loads(last.removeprefix(b"data: "))["output_ids"]


def _beams(answer: dict) -> list[tuple]:
    return [tuple(beam["output_ids"]) for beam in answer["meta_info"]["beam_results"]]


def _flush(server: LocalServer) -> None:
    deadline = time.monotonic() + 20
    while not requests.post(f"{server.url}/flush_cache", timeout=30).ok:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _logprobs(server: LocalServer, prompt: str, start: int) -> tuple[list[int], list[float]]:
    request = {"return_logprob": True, "logprob_start_len": start, "max_new_tokens": 4}
    info = server.generate(prompt, **request)["meta_info"]
    pairs = [pair for pair in info["input_token_logprobs"] + info["output_token_logprobs"] if pair[0] is not None]
    return [token for _, token, *_ in pairs], [value for value, *_ in pairs]


def _tokens(said: list[tuple]) -> list[tuple]:
    """Without the cache hits, which depend on chunks."""
    return [answer[0] if isinstance(answer[0], tuple) else answer for answer in said]
