"""NGRAM speculation over rows: the answers are those without it, because a verified draft is a decode of its own."""

from __future__ import annotations

import pytest
import traffic
from servers import COMMON_FLAGS, running, tokens_of

from local_server import LocalServer

FLAGS = (*COMMON_FLAGS, "--max-total-tokens", "2048", "--chunked-prefill-size", "256", "--enable-metrics")
FLAGS += ("--schedule-conservativeness", "0.1", "--kv-compress", "spark")
LOSSLESS = ("--spark-key-ratio", "0", "--spark-value-dtype", "auto")
NGRAM = ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "6")
CHAIN = ("--speculative-ngram-max-bfs-breadth", "1")
CANARY = {"SGLANG_SPARK_CANARY": "1"}


@pytest.fixture(scope="module", params=[LOSSLESS, ()], ids=["lossless", "compressed"])
def servers(request):
    """Without drafts; with trees of them, every row checked; with chains."""
    flags = (*FLAGS, *request.param)
    servers = LocalServer(*flags), LocalServer(*flags, *NGRAM, env=CANARY), LocalServer(*flags, *NGRAM, *CHAIN)
    with running(*servers):
        yield request.param == LOSSLESS, servers


@pytest.mark.parametrize(
    "conversation",
    [traffic.shared_prefix, traffic.chat, traffic.more_than_the_pool, traffic.aborts, traffic.concurrent],
    ids=lambda conversation: conversation.__name__,
)
def test_answers_are_those_without_speculation(conversation, servers):
    """What a prefix hit or a retraction finds may differ by a token, which compressed rows can show."""
    is_lossless, servers = servers
    for server in servers:
        server.flush_cache()
    plain, *speculative = (tokens_of(conversation(server)) for server in servers)
    for said in speculative:
        assert len(said) == len(plain)
        if is_lossless or conversation in (traffic.shared_prefix, traffic.more_than_the_pool):
            assert said == plain


def test_drafts_are_accepted_and_their_rows_counted(servers):
    repeated = "one two three four five six seven eight nine ten " * 12
    for server in servers[1][1:]:
        answer = server.generate(repeated, max_new_tokens=64)["meta_info"]
        assert answer["completion_tokens"] / answer["spec_verify_ct"] > 1.2
        metrics = server.metrics()
        assert metrics["sglang:spark_rows_written_total"] > metrics["sglang:spec_verify_calls_total"] * 6
