"""Models whose window layers are SGLang's: with lossless rows they say what the dense server says.

The dense server keeps the whole context of every layer, so what the other drops with a window must never be missed.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import traffic
from servers import COMMON_FLAGS, bytes_by_the_doctor, running, tokens_of
from variants import write_gemma3

from local_server import LocalServer

LOSSLESS = ("--kv-compress", "spark", "--spark-key-ratio", "0", "--spark-value-dtype", "auto")
REAL = Path(__file__).resolve().parents[2] / "models" / "gemma3-270m"
# Small enough for requests to be retracted and prefixes to be evicted, of rows and of windows.
FLAGS = (*COMMON_FLAGS, "--max-total-tokens", "2048", "--chunked-prefill-size", "256")
FLAGS += ("--schedule-conservativeness", "0.1")


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Dense, lossless, and as compressed as by default with every row checked."""
    model = write_gemma3(tmp_path_factory.mktemp("hybrid") / "gemma3")
    compressed = LocalServer(*FLAGS, "--kv-compress", "spark", model=model, env={"SGLANG_SPARK_CANARY": "1"})
    servers = LocalServer(*FLAGS, model=model), LocalServer(*FLAGS, *LOSSLESS, model=model), compressed
    with running(*servers):
        yield servers


@pytest.mark.parametrize(
    "conversation",
    [traffic.shared_prefix, traffic.two_users, traffic.more_than_the_pool, traffic.aborts, traffic.concurrent],
    ids=lambda conversation: conversation.__name__,
)
def test_same_tokens_as_dense_and_no_row_changes(conversation, servers):
    for server in servers:
        server.flush_cache()
    dense, lossless, compressed = (conversation(server) for server in servers)
    assert tokens_of(lossless) == tokens_of(dense)
    assert len(compressed) == len(dense)
    if conversation is traffic.concurrent:
        for server in servers[1:]:
            server.log_line("Retract requests")
    if conversation is traffic.shared_prefix:
        hits = [cached for _, cached in lossless]
        assert hits == [cached for _, cached in dense] and max(hits) > 64


def test_both_pools_are_reported(servers):
    _, lossless, compressed = servers
    windows = 4 * 2 * 2 * 64 * 4
    for server in (lossless, compressed):
        line = rf"beside them 4 window layers, dense, {windows} bytes per token for 1638 tokens"
        assert server.log_line(line)
        (state,) = server.info()["internal_states"]
        assert state["spark_kv_cache"]["window_bytes_per_token"] == windows
        assert state["spark_kv_cache"]["bytes_per_token"] == bytes_by_the_doctor(server)
    assert lossless.capacity().bytes_per_token == 2 * 2 * 2 * 64 * 4


@pytest.mark.skipif(not REAL.is_dir(), reason="make real-models has not made models/gemma3-270m")
def test_a_real_model_says_what_it_says_dense():
    """Prompts of several windows of 512 tokens, in chunks, and again from the cache."""
    flags = (*COMMON_FLAGS, "--max-total-tokens", "6000", "--chunked-prefill-size", "256")
    dense, lossless = LocalServer(*flags, model=REAL), LocalServer(*flags, *LOSSLESS, model=REAL)
    text = Path(__file__).with_name("traffic.py").read_text()
    with running(dense, lossless):
        for prompt in (text[:6000], text[:4000], text[:6000] + "\n\ndef"):
            assert (
                lossless.generate(prompt, max_new_tokens=48)["text"]
                == dense.generate(prompt, max_new_tokens=48)["text"]
            )
        prompts = [text[start : start + 2500] for start in range(0, 2500, 500)]
        said = [
            [answer["text"] for answer in server.generate(prompts, max_new_tokens=200)] for server in (dense, lossless)
        ]
        assert said[0] == said[1]
