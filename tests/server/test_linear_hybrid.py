"""A model whose other layers keep a state, under Triton's interpreter, which runs SGLang's kernels for them here."""

from __future__ import annotations

from servers import COMMON_FLAGS, bytes_by_the_doctor, running
from variants import write_qwen3_next

from local_server import LocalServer

# What SGLang asks of such models where its kernels for GPUs cannot run.
FLAGS = (*COMMON_FLAGS, "--mamba-radix-cache-strategy", "no_buffer", "--disable-overlap-schedule")
FLAGS += ("--max-total-tokens", "1024", "--chunked-prefill-size", "32", "--skip-server-warmup")
SPARK = ("--kv-compress", "spark")
LOSSLESS = (*SPARK, "--spark-key-ratio", "0", "--spark-value-dtype", "auto")
INTERPRETED = {"TRITON_INTERPRET": "1"}
PROMPT = "The quick brown fox jumps over the lazy dog and then runs away from it, says the story. " * 2


def test_the_same_tokens_as_dense_and_hits_through_the_states(tmp_path):
    model = write_qwen3_next(tmp_path / "qwen3-next")
    servers = [LocalServer(*FLAGS, *spark, model=model, env=INTERPRETED) for spark in ((), LOSSLESS, SPARK)]
    with running(*servers):
        dense, lossless, compressed = servers
        said = [[], []]
        for server, answers in zip((dense, lossless), said, strict=True):
            # Misses, a continued prompt, and two at once.
            for prompts in (PROMPT, PROMPT + "And more of it.", [PROMPT[:60], PROMPT[20:100]]):
                reply = server.generate(prompts, max_new_tokens=8)
                for answer in reply if isinstance(prompts, list) else [reply]:
                    answers.append((answer["output_ids"], answer["meta_info"]["cached_tokens"]))
        assert said[0] == said[1]
        assert said[0][1][1] >= 32
        assert compressed.generate(PROMPT, max_new_tokens=8)["meta_info"]["completion_tokens"] == 8
        # Two layers of six.
        assert lossless.capacity().bytes_per_token == bytes_by_the_doctor(lossless) == 2 * 2 * 2 * 64 * 4
        assert compressed.capacity().bytes_per_token == bytes_by_the_doctor(compressed)
