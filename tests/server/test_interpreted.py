"""The Triton kernels behind a real server, without a GPU: Triton interprets them, at a second per token.

Three of the four layers keep whole keys.
"""

from __future__ import annotations

import pytest
from servers import COMMON_FLAGS, running

from local_server import LocalServer
from recall_tasks import make_items

FLAGS = (
    *COMMON_FLAGS,
    "--max-total-tokens",
    "1024",
    "--kv-compress",
    "spark",
    "--spark-dense-layers",
    "0-2",
    "--skip-server-warmup",
)


@pytest.fixture(scope="module")
def server():
    server = LocalServer(*FLAGS, "--page-size", "16", env={"TRITON_INTERPRET": "1"})
    with running(server):
        yield server


def test_questions_are_answered_and_the_second_finds_its_prefix(server):
    server.log_line("SparK attention: Triton kernels on cpu")
    item = make_items("multi_turn", seed=41, count=1, target_tokens=50, questions=2)[0]
    cached_tokens = []
    for turn in item.turns:
        begun, _, _ = turn.answer.partition(turn.value)
        prompt = f"{item.document}\nQuestion: {turn.question}\nAnswer: {begun}".rstrip()
        said = server.generate(prompt, max_new_tokens=len(turn.value.split()))
        assert turn.is_correct(said["text"]), said
        cached_tokens.append(said["meta_info"]["cached_tokens"])
    assert cached_tokens[0] == 0 and cached_tokens[1] >= 32
