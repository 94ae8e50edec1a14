#!/usr/bin/env python3
"""Serve the recall model with the SGLang of this interpreter: dense, lossless rows and compressed rows.

Exits with an error unless lossless rows give the dense server's tokens and cache hits, and compressed rows answer the
same question from a cold and from a shared prefix. Servers run one after another, on whatever device SGLang finds.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from local_server import LocalServer  # noqa: E402
from recall_tasks import make_items  # noqa: E402

# float32 so that batching does not change tokens; a fixed pool so that servers do not depend on free memory.
FLAGS = ("--dtype", "float32", "--random-seed", "0", "--max-running-requests", "8", "--max-total-tokens", "4096")
MODES = {
    "compressed": ("--kv-compress", "spark"),
    "lossless": ("--kv-compress", "spark", "--spark-key-ratio", "0", "--spark-value-dtype", "auto"),
    "dense": (),
}
NEW_TOKENS = 24


class SmokeFailed(Exception):
    """What a server did otherwise than it must, in one sentence."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what was run and seen to this file")
    parser.add_argument("--page-size", type=int, default=1, help="SGLang's --page-size")
    options = parser.parse_args()
    item = make_items("multi_turn", seed=1, count=1, target_tokens=400, questions=2)[0]
    prompts = [f"{item.document}\nQuestion: {turn.question}\nAnswer:" for turn in item.turns]
    said = {}
    try:
        _check_targets()
        for mode, flags in MODES.items():
            with LocalServer(*FLAGS, "--page-size", str(options.page_size), *flags) as server:
                said[mode] = [_ask(server, prompt) for prompt in prompts]
                if mode != "dense":
                    server.capacity()
        check(said, item.turns)
    except (SmokeFailed, RuntimeError, LookupError) as error:
        print(f"SGLang {version('sglang')}: {error}", file=sys.stderr)
        return 1
    report = {
        "packages": {name: version(name) for name in ("sglang", "torch", "transformers", "triton", "numba")},
        "page_size": options.page_size,
        "answers": said,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    hits = [answer["cached_tokens"] for answer in said["compressed"]]
    print(f"SGLang {version('sglang')}: lossless rows equal dense, compressed rows answer, cached tokens {hits}")
    return 0


def _check_targets() -> None:
    """Everything that SparK hooks into is there, also in a release that start-up does not question."""
    from sglang_spark.hooks import HOOKS
    from sglang_spark.targets import CALLED

    targets = (*CALLED, *(hook.target for hook in HOOKS))
    problems = [problem for target in targets if (problem := target.problem()) is not None]
    if problems:
        raise SmokeFailed("; ".join(problems))


def _ask(server: LocalServer, prompt: str) -> dict:
    answer = server.generate(prompt, max_new_tokens=NEW_TOKENS)
    return {
        "output_ids": answer["output_ids"],
        "text": answer["text"],
        "cached_tokens": answer["meta_info"]["cached_tokens"],
        "prompt_tokens": answer["meta_info"]["prompt_tokens"],
    }


def check(said: dict[str, list[dict]], turns) -> None:
    """Compare what the three servers said.

    Raises
    ------
    SmokeFailed
        Names the mode and what differs.
    """
    for dense, lossless in zip(said["dense"], said["lossless"], strict=True):
        if dense != lossless:
            raise SmokeFailed(f"lossless rows do not equal dense: {lossless} instead of {dense}")
    for dense, compressed, turn in zip(said["dense"], said["compressed"], turns, strict=True):
        if turn.is_correct(dense["text"]) and not turn.is_correct(compressed["text"]):
            raise SmokeFailed(f"compressed rows answer {compressed['text']!r} where dense answers {dense['text']!r}")
    for mode, (cold, shared) in said.items():
        half = cold["prompt_tokens"] // 2
        hits = (cold["cached_tokens"], shared["cached_tokens"])
        # The server's own warm-up request may share a first token or two.
        if hits[0] >= half or hits[1] < half:
            raise SmokeFailed(f"{mode}: expected a miss and then a prefix hit, cached tokens were {hits}")


if __name__ == "__main__":
    sys.exit(main())
