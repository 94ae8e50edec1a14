#!/usr/bin/env python3
"""A chat over a long document and a forked frontend program, from a dense KV cache and from compressed ones.

Starts servers that differ by their cache, asks all of them the same questions and shows the answers side by side with
what each took from its cache: dense and ``--kv-compress spark``, and dense fp8 too with ``--model``.
Exits with status 1 if an answer that the dense cache gets right is lost from the compressed one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from frontend_fork_join import ask_in_forks
from local_server import RECALL_MODEL, LocalServer, Reply, ServerFailed
from multi_turn_chat import chat
from recall_tasks import RecallItem, make_items

FLAGS = ("--max-total-tokens", "16384", "--enable-cache-report", "--random-seed", "0")
CACHES = {"dense": (), "dense fp8": ("--kv-cache-dtype", "fp8_e4m3"), "spark": ("--kv-compress", "spark")}
SEED = 11
# Of each document: a real model reads about as many tokens a second on two cores.
TOKENS = {True: 900, False: 500}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="PATH", help="a real model, such as models/qwen2.5-coder-0.5b")
    parser.add_argument("--tokens", type=int, help="length of the documents in words (default: 900, with --model 500)")
    parser.add_argument("--seed", type=int, default=SEED, help="which documents and questions")
    arguments = parser.parse_args()
    model = arguments.model or RECALL_MODEL
    if not (model / "config.json").exists():
        parser.error(f"--model {model}: no model is there; make real-models makes some")
    tokens = arguments.tokens or TOKENS[arguments.model is None]

    console = Console(width=None if sys.stdout.isatty() else 140)
    names = ("dense", "spark") if arguments.model is None else tuple(CACHES)
    servers = {name: LocalServer(*FLAGS, *CACHES[name], model=str(model)) for name in names}
    console.print(f"[bold]Starting {len(names)} servers[/] on {model.name}: {', '.join(names)}")
    try:
        with ExitStack() as stack, ThreadPoolExecutor() as pool:
            with console.status("a server takes half a minute to start"):
                for server in pool.map(LocalServer.__enter__, servers.values()):
                    stack.push(server)
            return show(console, servers, tokens, arguments.seed)
    except ServerFailed as error:
        console.print(error, style="red", markup=False)
        return 2


def show(console: Console, servers: dict[str, LocalServer], tokens: int, seed: int) -> int:
    """Ask all servers, print the tables and return the exit status."""
    chat_item = make_items("multi_turn", seed, 1, tokens, questions=5)[0]
    program_item = make_items("multi_needle", seed, 1, tokens, questions=4)[0]
    lost = 0
    for status, title, ask, item in (
        (
            "chatting over a long document",
            "Multi-turn chat through the OpenAI client: a document and the first question, then four more questions",
            chat,
            chat_item,
        ),
        (
            "running a frontend program",
            "SGLang frontend program: four questions forked from one document",
            ask_in_forks,
            program_item,
        ),
    ):
        with console.status(status):
            answers = {name: ask(server.url, item) for name, server in servers.items()}
        console.print(answer_table(title, item, answers))
        lost += sum(
            turn.is_correct(dense.text) and not turn.is_correct(spark.text)
            for turn, dense, spark in zip(item.turns, answers["dense"], answers["spark"], strict=True)
        )
    print_capacity(console, servers["spark"])
    if lost:
        console.print(f"[bold red]{lost} answer(s) that the dense cache gets right were lost[/]")
        return 1
    console.print("[bold green]No answer that the dense cache gets right was lost[/]")
    return 0


def answer_table(title: str, item: RecallItem, answers: dict[str, Sequence[Reply]]) -> Table:
    """A row per question: every cache's answer, the tokens of the prompt, and how many came from each cache in turn."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("question", *answers):
        table.add_column(name)
    for name in ("prompt", "of it cached"):
        table.add_column(name, justify="right")
    for turn, *replies in zip(item.turns, *answers.values(), strict=True):
        table.add_row(
            turn.question,
            *(marked(reply.text, turn.is_correct(reply.text)) for reply in replies),
            str(replies[0].prompt_tokens),
            " / ".join(str(reply.cached_tokens) for reply in replies),
        )
    return table


def marked(text: str, right: bool) -> str:
    return f"[green]✓[/] {text.strip()}" if right else f"[red]✗[/] {text.strip()}"


def print_capacity(console: Console, spark: LocalServer) -> None:
    """What the compressed server reported at start-up, beside what a dense cache would take."""
    capacity = spark.capacity()
    table = Table(title="KV cache", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("spark", justify="right")
    table.add_row("bytes per token", str(capacity.dense_bytes_per_token), str(capacity.bytes_per_token))
    table.add_row("tokens in the same memory", str(capacity.dense_tokens), str(capacity.tokens))
    table.add_row("", "1.00x", f"{capacity.dense_bytes_per_token / capacity.bytes_per_token:.2f}x")
    console.print(table)
    console.print(f"{capacity.kept}, {capacity.value_dtype} values")


if __name__ == "__main__":
    sys.exit(main())
