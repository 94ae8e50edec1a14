#!/usr/bin/env python3
"""Write docs/compatibility.md: what ``--kv-compress spark`` serves with, and the test or the reason behind each answer.

Refusals come from ``sglang_spark.refusals``. What works is named here with the test that shows it, and a test
checks that these tests exist and that the document is up to date (``--check``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "compatibility.md"
REFUSAL_TEST = "tests/sglang_spark/test_refusals.py::test_launch_is_refused_with_setting_reason_and_remedy"

HEADER = """\
# Compatibility

Written by `python scripts/compatibility_matrix.py`; do not edit.

Every argument of SGLang 0.5.21 that touches the cache or attention is in one of four lists: works, with the test that
shows it; refused, with the reason; without effect; not tried. Unless a test's name says otherwise, *works* means: with
whole keys (`--spark-key-ratio 0`) the same tokens as the dense server, in float32, on a CPU. Nothing here has run on a
GPU.
"""

UNTRIED = """\
## Not tried

These act on slots or wait for a GPU, and nothing is known against them: CUDA graphs, `--enable-memory-saver`,
`--enable-dp-attention`, `--enable-streaming-session`, `--enable-session-radix-cache`, `--enable-priority-scheduling`,
`--retraction-policy priority`, `--enable-dynamic-chunking`, `--pp-async-batch-depth`, `--kv-events-config`, models with
images. `input_embeds` gave what the token ids give, in bfloat16, by hand; there is no test.
"""

NO_EFFECT = """\
## Without effect

They tune attention backends or pools that are not used with SparK: `--triton-attention-*`, `--enable-lean-attention`,
`--flashinfer-mla-disable-ragged`, `--disable-chunked-prefix-cache`, `--prefill-kv-cache-dequant-dtype`, `--dsa-*`,
`--dsv4-*`, `--swa-*`, `--disable-hybrid-swa-memory`, `--mamba-*`, `--linear-attn-*`, `--c128-page-size`. Those of a
refused setting (`--hicache-*`, `--speculative-*`, `--disaggregation-*`, `--dcp-*`, `--cp-strategy`,
`--lmcache-config-file` and so on) do nothing without it. All other arguments concern weights, experts, requests, logs
or the network.
"""

LOSSLESS = "tests/server/test_lossless.py::test_same_tokens_and_cache_hits_as_dense"
SCALE = "tests/server/test_scale.py::"
SCHEDULING = "tests/server/test_scheduling.py::"
MODELS = "tests/server/test_models.py::"
COMPRESSED = "tests/server/test_compressed.py::"
LAUNCH = "tests/server/test_launch.py::"
FLAGS = "tests/sglang_spark/test_flags.py::"
CONTRACT = "tests/sglang_spark/test_row_contract.py::"
RELIABILITY = "tests/server/test_reliability.py::"
REORDERED = SCHEDULING + "test_same_tokens_under_retraction_and_mixed_batches"

# By section: what works, and the test that shows it, as pytest's node id without parameters.
FEATURES: dict[str, dict[str, str]] = {
    "Cache": {
        "radix cache: prefix hits, multi-turn chats, shared system prompts": LOSSLESS,
        "the dense server's cache hits with pruned keys": COMPRESSED + "test_cached_tokens_equal_the_dense_server",
        "`--disable-radix-cache`": SCALE + "test_without_the_radix_cache",
        "`--page-size` 1 and 16; `--radix-eviction-policy` lru, tlru": LOSSLESS,
        "`--page-size` 64; `--radix-eviction-policy` lfu": SCALE
        + "test_page_size_64_with_least_frequently_used_eviction",
        "`--radix-eviction-policy` slru": SCALE + "test_tensor_parallel",
        "`--radix-eviction-policy` priority": SCALE + "test_data_parallel_by_sglang_serve",
        "`--strip-thinking-cache`": REORDERED,
        "retraction when the pool is full": "tests/server/test_lossless.py::"
        "test_same_tokens_when_requests_are_retracted",
        "weight updates beside streams and cached prefixes": SCHEDULING
        + "test_weights_change_beside_streams_and_cached_prefixes",
        "slot moves and CPU copies": "tests/sglang_spark/test_pool.py::test_moved_slots_keep_their_rows",
        "rows in SGLang's host pool (HiCache)": CONTRACT + "test_rows_survive_a_stay_in_the_host_pool",
        "pages sent by address (PD disaggregation)": CONTRACT + "test_pages_sent_by_address_are_read_as_they_were",
    },
    "Scheduling and parallelism": {
        "chunked prefill, overlap scheduler, aborts and disconnects": LOSSLESS,
        "`--chunked-prefill-size` 64 with `--enable-mixed-chunk` and forced retraction": REORDERED,
        "`--schedule-policy lpm`, `--prefill-max-requests`, `--prefill-decode-interval`, "
        "`--num-continuous-decode-steps`": REORDERED,
        "`--disable-overlap-schedule`": SCALE + "test_without_the_radix_cache",
        "`--tokenizer-worker-num` 2": SCALE + "test_asked_in_many_ways",
        "`--tp-size` 2": SCALE + "test_tensor_parallel",
        "`--tp-size` 2 with three KV heads": MODELS + "test_the_doctor_counts_what_a_server_stores",
        "`--dp-size` 2": SCALE + "test_data_parallel_by_sglang_serve",
        "`--pp-size` 2": SCALE + "test_pipeline_parallel",
        "random programs: branching chats, aborts, timeouts, an overflowing pool": RELIABILITY + "test_random_programs",
        "a killed scheduler: clients get an error, the server exits": RELIABILITY
        + "test_clients_of_a_killed_scheduler_get_an_error_and_the_server_exits",
        "no row changes between its write and its reads": "tests/server/test_canary_server.py::"
        "test_a_changed_row_stops_the_server",
    },
    "Ways to start and to watch": {
        "`python -m sglang.launch_server`": LOSSLESS,
        "`sglang serve`": SCALE + "test_data_parallel_by_sglang_serve",
        "`sglang.Engine`": LAUNCH + "test_engine_takes_the_flags_as_keywords",
        "`sglang.Engine`, a batch of prompts": LAUNCH + "test_the_offline_engine_example",
        "`--config` YAML": FLAGS + "test_yaml_config",
        "frontend programs with fork and join": COMPRESSED + "test_a_frontend_program_forks_from_shared_slots",
        "`/metrics` and `/server_info`": COMPRESSED + "test_metrics_and_server_info_follow_the_traffic",
        "without `--kv-compress spark`, as if not installed": LAUNCH
        + "test_without_the_flag_the_plugin_changes_nothing",
    },
    "Requests": {
        "OpenAI chat completions": LOSSLESS,
        "streaming, `n` above 1, JSON schema, regular expressions, LoRA adapters": SCALE + "test_asked_in_many_ways",
        "`beam_width` above 1 (prompts within one chunk, as in SGLang)": SCHEDULING + "test_beams",
        "log-probabilities of prompt and answer": SCALE + "test_logprobs_of_prompt_and_answer",
        "`logprob_start_len` anywhere around a cached prefix": SCHEDULING
        + "test_logprobs_from_anywhere_around_a_cached_prefix",
        "malformed requests and prompts beyond the pool or the context": RELIABILITY
        + "test_malformed_and_oversize_requests_are_refused_as_by_the_dense_server",
        "embeddings from a generation model: status 400, as without SparK": SCALE
        + "test_embeddings_of_a_generation_model_are_refused",
    },
    "Models and values": {
        "models whose configuration has a window that SGLang ignores (Mistral, Phi-3, Qwen2-MoE)": "tests/sglang_spark/"
        "test_refusals.py::test_windows_that_sglang_ignores_and_loops_are_served",
        "looped models (Nanbeige)": MODELS + "test_a_looped_model_says_what_the_dense_server_says",
        "checkpoints that say how their cache is stored (`kv_cache_scheme`)": MODELS
        + "test_the_doctor_counts_what_a_server_stores",
        "`--kv-cache-dtype auto`": COMPRESSED + "test_recall_questions_are_answered",
        "`--kv-cache-dtype fp8_e4m3`, `--spark-dense-layers`": COMPRESSED
        + "test_recall_questions_are_answered_with_small_values",
        "`--quantization-param-path`": "tests/sglang_spark/test_backend.py::"
        "test_values_are_stored_by_the_scale_of_the_layer",
    },
}


def link(test: str) -> str:
    """A test's name, leading to its file."""
    file, _, name = test.partition("::")
    return f"[`{name}`](../{file})"


def document() -> str:
    """The whole text of docs/compatibility.md."""
    from sglang_spark.refusals import REFUSALS

    lines = [HEADER]
    for section, features in FEATURES.items():
        lines += [f"## {section}\n", "| works | test |", "|---|---|"]
        lines += [f"| {feature} | {link(test)} |" for feature, test in features.items()]
        lines.append("")
    lines += [
        "## Refused\n",
        f"The server does not start, and the error says this. Test: {link(REFUSAL_TEST)}.\n",
        "| setting | why | what to do instead |",
        "|---|---|---|",
    ]
    lines += [f"| {_code(row.setting)} | {row.why} | {row.instead} |" for row in REFUSALS]
    return "\n".join(lines) + f"\n\n{NO_EFFECT}\n{UNTRIED}"


def _code(setting: str) -> str:
    return f"`{setting}`" if setting.startswith("--") else setting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the document is out of date"
    )
    if parser.parse_args().check:
        return int(DOCUMENT.read_text() != document())
    DOCUMENT.write_text(document())
    return 0


if __name__ == "__main__":
    sys.exit(main())
