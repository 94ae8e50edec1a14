"""Hybrid models whose other layers need SGLang's GPU kernels: Triton's interpreter runs them here.

Of Qwen3-Next they keep a state. Of gpt-oss they attend to a window, with sinks, by SGLang's Triton backend.
"""

from __future__ import annotations

import pytest
from servers import COMMON_FLAGS, bytes_by_the_doctor, running
from variants import write_gpt_oss, write_qwen3_next

from local_server import LocalServer

FLAGS = (*COMMON_FLAGS, "--max-total-tokens", "1024", "--chunked-prefill-size", "32")
# What SGLang asks of models with states where its kernels for GPUs cannot run.
STATES = ("--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule")
SPARK = ("--kv-compress", "spark")
LOSSLESS = (*SPARK, "--spark-key-ratio", "0", "--spark-value-dtype", "auto")
INTERPRETED = {"TRITON_INTERPRET": "1"}
PROMPT = "The quick brown fox jumps over the lazy dog and then runs away from it, says the story. " * 4

# The model, flags of all its servers, and of those with rows.
MODELS = {
    "qwen3-next": (write_qwen3_next, STATES, ()),
    "gpt-oss": (write_gpt_oss, (), ("--spark-window-backend", "triton")),
}


@pytest.mark.parametrize(("write", "flags", "beside_rows"), MODELS.values(), ids=MODELS)
def test_the_same_tokens_and_hits_as_dense(write, flags, beside_rows, tmp_path):
    model = write(tmp_path / "model")
    kinds = ((), (*LOSSLESS, *beside_rows), (*SPARK, *beside_rows))
    servers = [LocalServer(*FLAGS, *flags, *kind, model=model, env=INTERPRETED) for kind in kinds]
    with running(*servers):
        dense, lossless, compressed = servers
        said = [[], []]
        for server, answers in zip((dense, lossless), said, strict=True):
            # A prompt of several chunks and windows, one that goes on from it, and two at once.
            for prompts in (PROMPT, PROMPT + "And more of it.", [PROMPT[:60], PROMPT[20:100]]):
                reply = server.generate(prompts, max_new_tokens=8)
                for answer in reply if isinstance(prompts, list) else [reply]:
                    answers.append((answer["output_ids"], answer["meta_info"]["cached_tokens"]))
        assert said[0] == said[1]
        assert said[0][1][1] > 100
        assert compressed.generate(PROMPT, max_new_tokens=8)["meta_info"]["completion_tokens"] == 8
        # Two layers of six.
        assert lossless.capacity().bytes_per_token == bytes_by_the_doctor(lossless) == 2 * 2 * 2 * 64 * 4
        assert compressed.capacity().bytes_per_token == bytes_by_the_doctor(compressed)
