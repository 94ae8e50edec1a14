#!/usr/bin/env python3
"""Write docs/compatibility.md: what ``--kv-compress spark`` serves with, and the test or the reason behind each answer.

Refusals come from ``sglang_spark.refusals``. What works is named here with the test that shows it, and a test
checks that these tests exist and that the document is up to date (``--check``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "compatibility.md"
REFUSAL_TEST = "tests/sglang_spark/test_refusals.py::test_launch_is_refused_with_setting_reason_and_remedy"

HEADER = """\
# Compatibility

Written by `python scripts/compatibility_matrix.py`; do not edit.

A cell says *works* and names the test that shows it, *refused* and why (the server does not start and says what would
work instead), or *blocked* and what is missing to find out. Unless a test's name says otherwise, *works* means: at
ratio 0 the same tokens as the dense server, in float32.
"""


class Works(NamedTuple):
    """Shown by a test, given as pytest's node id without parameters."""

    test: str

    def __str__(self) -> str:
        return f"works: {link(self.test)}"


class Refused(NamedTuple):
    """Answered with an error; the test that shows it, where it is not in the table of refusals."""

    why: str
    test: str | None = None

    def __str__(self) -> str:
        return f"refused: {self.why}" + (f" ({link(self.test)})" if self.test else "")


class Blocked(NamedTuple):
    """Not known, and why."""

    reason: str

    def __str__(self) -> str:
        return f"blocked: {self.reason}"


Cell = Works | Refused | Blocked

LOSSLESS = "tests/server/test_lossless.py::test_same_tokens_and_cache_hits_as_dense"
SCALE = "tests/server/test_scale.py::"
COMPRESSED = "tests/server/test_compressed.py::"
LAUNCH = "tests/server/test_launch.py::"
FLAGS = "tests/sglang_spark/test_flags.py::"
CONTRACT = "tests/sglang_spark/test_row_contract.py::"
RELIABILITY = "tests/server/test_reliability.py::"
NEEDS_GPU = Blocked("needs a GPU")

# On a CPU, by section and feature.
FEATURES: dict[str, dict[str, Cell]] = {
    "Cache": {
        "radix cache: prefix hits, multi-turn chats, shared system prompts": Works(LOSSLESS),
        "the dense server's cache hits with pruned keys": Works(
            COMPRESSED + "test_cached_tokens_equal_the_dense_server"
        ),
        "`--disable-radix-cache`": Works(SCALE + "test_without_the_radix_cache"),
        "`--page-size` 1 and 16": Works(LOSSLESS),
        "`--page-size` 64": Works(SCALE + "test_page_size_64_with_least_frequently_used_eviction"),
        "`--radix-eviction-policy` lru, tlru": Works(LOSSLESS),
        "`--radix-eviction-policy` lfu": Works(SCALE + "test_page_size_64_with_least_frequently_used_eviction"),
        "`--radix-eviction-policy` slru": Works(SCALE + "test_tensor_parallel"),
        "`--radix-eviction-policy` priority": Works(SCALE + "test_data_parallel_by_sglang_serve"),
        "retraction when the pool is full": Works(
            "tests/server/test_lossless.py::test_same_tokens_when_requests_are_retracted"
        ),
        "slot moves and CPU copies": Works("tests/sglang_spark/test_pool.py::test_moved_slots_keep_their_rows"),
        "HiCache: rows in SGLang's host pool": Works(CONTRACT + "test_rows_survive_a_stay_in_the_host_pool"),
        "HiCache: a server": NEEDS_GPU,
        "PD disaggregation: pages sent by address": Works(
            CONTRACT + "test_pages_sent_by_address_are_read_as_they_were"
        ),
        "PD disaggregation: two servers": NEEDS_GPU,
    },
    "Scheduling and parallelism": {
        "chunked prefill": Works(LOSSLESS),
        "`--enable-mixed-chunk`": Works(SCALE + "test_mixed_chunks"),
        "overlap scheduler": Works(LOSSLESS),
        "`--disable-overlap-schedule`": Works(SCALE + "test_without_the_radix_cache"),
        "aborts and disconnects": Works(LOSSLESS),
        "random programs: branching chats, aborts, disconnects, timeouts, an overflowing pool": Works(
            RELIABILITY + "test_random_programs"
        ),
        "a killed scheduler: clients get an error, the server exits": Works(
            RELIABILITY + "test_clients_of_a_killed_scheduler_get_an_error_and_the_server_exits"
        ),
        "no row changes between its write and its reads": Works(
            "tests/server/test_canary_server.py::test_a_changed_row_stops_the_server"
        ),
        "`--tp-size` 2": Works(SCALE + "test_tensor_parallel"),
        "`--dp-size` 2": Works(SCALE + "test_data_parallel_by_sglang_serve"),
        "`--pp-size` 2": Works(SCALE + "test_pipeline_parallel"),
        "CUDA graphs": NEEDS_GPU,
    },
    "Ways to start and to watch": {
        "`python -m sglang.launch_server`": Works(LOSSLESS),
        "`sglang serve`": Works(SCALE + "test_data_parallel_by_sglang_serve"),
        "`sglang.Engine`": Works(LAUNCH + "test_engine_takes_the_flags_as_keywords"),
        "`sglang.Engine`, a batch of prompts": Works(LAUNCH + "test_the_offline_engine_example"),
        "`--config` YAML": Works(FLAGS + "test_yaml_config"),
        "frontend programs with fork and join": Works(COMPRESSED + "test_a_frontend_program_forks_from_shared_slots"),
        "`/metrics` and `/server_info`": Works(COMPRESSED + "test_metrics_and_server_info_follow_the_traffic"),
        "without `--kv-compress spark`, as if not installed": Works(
            LAUNCH + "test_without_the_flag_the_plugin_changes_nothing"
        ),
    },
    "Requests": {
        "OpenAI chat completions": Works(LOSSLESS),
        "streaming": Works(SCALE + "test_asked_in_many_ways"),
        "`n` above 1": Works(SCALE + "test_asked_in_many_ways"),
        "JSON schema and regular expressions": Works(SCALE + "test_asked_in_many_ways"),
        "LoRA adapters": Works(SCALE + "test_asked_in_many_ways"),
        "log-probabilities of prompt and answer": Works(SCALE + "test_logprobs_of_prompt_and_answer"),
        "malformed requests and prompts beyond the pool or the context": Works(
            RELIABILITY + "test_malformed_and_oversize_requests_are_refused_as_by_the_dense_server"
        ),
        "embeddings from a generation model": Refused(
            "status 400, as without SparK", SCALE + "test_embeddings_of_a_generation_model_are_refused"
        ),
    },
    "Values": {
        "`--kv-cache-dtype auto`": Works(COMPRESSED + "test_recall_questions_are_answered"),
        "`--kv-cache-dtype fp8_e4m3`": Works(COMPRESSED + "test_recall_questions_are_answered_with_small_values"),
        "`--spark-dense-layers`": Works(COMPRESSED + "test_recall_questions_are_answered_with_small_values"),
    },
}


def link(test: str) -> str:
    """A test's name, leading to its file."""
    file, _, name = test.partition("::")
    return f"[`{name}`](../{file})"


def gpu_cell(cpu: Cell) -> Cell:
    """The answer for GPUs: until SparK serves there, its own refusal of the device."""
    if not isinstance(cpu, Works):
        return cpu
    from sglang_spark.refusals import REFUSALS, Launch

    launch = Launch(requested={}, resolved=SimpleNamespace(device="cuda"), model_config=None)
    for refusal in REFUSALS:
        if refusal.setting == "--device" and refusal.offending(launch) is not None:
            return Refused(refusal.why)
    return Blocked("not yet run on a GPU")


def document() -> str:
    """The whole text of docs/compatibility.md."""
    from sglang_spark.refusals import REFUSALS

    lines = [HEADER]
    for section, features in FEATURES.items():
        lines += [f"## {section}\n", "| | CPU | NVIDIA GPU |", "|---|---|---|"]
        lines += [f"| {feature} | {cell} | {gpu_cell(cell)} |" for feature, cell in features.items()]
        lines.append("")
    lines += [
        "## Refused everywhere\n",
        f"Each with a test: {link(REFUSAL_TEST)}.\n",
        "| setting | | what works instead |",
        "|---|---|---|",
    ]
    lines += [f"| {_code(row.setting)} | {Refused(row.why)} | {row.instead} |" for row in REFUSALS]
    return "\n".join(lines) + "\n"


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
