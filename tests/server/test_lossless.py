"""With ``--spark-key-ratio 0`` rows are whole keys, so the server must say, token by token, what the dense one says.

This is the test of everything but the compression: slots, prefix sharing, chunks, eviction, retraction, aborts.
"""

from __future__ import annotations

import pytest
import traffic
from servers import COMMON_FLAGS, running

from local_server import LocalServer

# Small enough for twenty requests to overflow it and for documents to evict each other.
POOL_TOKENS = 2048


PAGES_AND_EVICTION = {
    "page_size=1-lru": ("--page-size", "1", "--radix-eviction-policy", "lru"),
    "page_size=16-tlru": (
        *("--page-size", "16", "--radix-eviction-policy", "tlru"),
        *("--radix-eviction-policy-config", '{"threshold": 256, "next_prompt_estimate": 32}'),
    ),
}


@pytest.fixture(scope="module", params=PAGES_AND_EVICTION)
def dense_and_spark(request):
    """The two servers, alike but for the flag."""
    flags = (*COMMON_FLAGS, "--max-total-tokens", str(POOL_TOKENS), "--chunked-prefill-size", "256")
    flags += (*PAGES_AND_EVICTION[request.param], "--schedule-conservativeness", "0.1")
    dense = LocalServer(*flags)
    spark = LocalServer(*flags, "--kv-compress", "spark", "--spark-key-ratio", "0", "--spark-value-dtype", "auto")
    with running(dense, spark):
        yield dense, spark


@pytest.mark.parametrize(
    "conversation",
    [traffic.shared_prefix, traffic.chat, traffic.two_users, traffic.more_than_the_pool, traffic.aborts],
    ids=lambda conversation: conversation.__name__,
)
def test_same_tokens_and_cache_hits_as_dense(conversation, dense_and_spark):
    dense, spark = dense_and_spark
    for server in dense_and_spark:
        server.flush_cache()
    expected = conversation(dense)
    assert expected == conversation(spark)


def test_same_tokens_when_requests_are_retracted(dense_and_spark):
    dense, spark = dense_and_spark
    expected = traffic.concurrent(dense)
    assert expected == traffic.concurrent(spark)
    for server in dense_and_spark:
        server.log_line("Retract requests")
