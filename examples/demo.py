#!/usr/bin/env python3
"""A chat over a long document and a forked frontend program, from a compressed KV cache and from a dense one.

Starts two servers on the bundled model that differ by ``--kv-compress spark``, asks both the same questions and
shows the answers side by side with what each took from its cache. Exits with status 1 if an answer that the dense
cache gets right is lost.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from rich.console import Console
from rich.table import Table

from frontend_fork_join import ask_in_forks
from local_server import RECALL_MODEL, LocalServer, Reply, ServerFailed
from multi_turn_chat import chat
from recall_tasks import Turn, make_items

FLAGS = ("--max-total-tokens", "16384", "--enable-cache-report", "--random-seed", "0")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=900, help="length of the documents in tokens")
    parser.add_argument("--seed", type=int, default=11, help="which documents and questions")
    parser.add_argument("--key-ratio", default="0.8", help="--spark-key-ratio of the compressed server")
    arguments = parser.parse_args()

    console = Console()
    spark_flags = ("--kv-compress", "spark", "--spark-key-ratio", arguments.key_ratio)
    dense, spark = LocalServer(*FLAGS), LocalServer(*FLAGS, *spark_flags)
    console.print(f"[bold]Starting two servers[/] on {RECALL_MODEL.name}: one dense, one with {' '.join(spark_flags)}")
    try:
        with ExitStack() as stack, ThreadPoolExecutor() as pool:
            with console.status("a server takes half a minute to start"):
                for server in pool.map(LocalServer.__enter__, (dense, spark)):
                    stack.push(server)
            return show(console, dense, spark, arguments.tokens, arguments.seed)
    except ServerFailed as error:
        console.print(error, style="red", markup=False)
        return 2


def show(console: Console, dense: LocalServer, spark: LocalServer, tokens: int, seed: int) -> int:
    """Ask both servers, print the tables and return the exit status."""
    chat_item = make_items("multi_turn", seed, 1, tokens, questions=5)[0]
    program_item = make_items("multi_needle", seed, 1, tokens, questions=4)[0]
    lost = 0
    with console.status("chatting over a long document"):
        answers = [chat(server.url, chat_item) for server in (dense, spark)]
    title = "Multi-turn chat through the OpenAI client: a document and the first question, then four more questions"
    lost += print_answers(console, title, chat_item.turns, *answers)
    with console.status("running a frontend program"):
        answers = [ask_in_forks(server.url, program_item) for server in (dense, spark)]
    title = "SGLang frontend program: four questions forked from one document"
    lost += print_answers(console, title, program_item.turns, *answers)
    print_capacity(console, spark)
    if lost:
        console.print(f"[bold red]{lost} answer(s) that the dense cache gets right were lost[/]")
        return 1
    console.print("[bold green]No answer that the dense cache gets right was lost[/]")
    return 0


def print_answers(console: Console, title: str, turns: tuple[Turn, ...], dense: list[Reply], spark: list[Reply]) -> int:
    """Print one table; returns how many answers were right from the dense cache and wrong from the compressed one."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("question")
    table.add_column("dense")
    table.add_column("spark")
    table.add_column("prompt", justify="right")
    table.add_column("cached, dense", justify="right")
    table.add_column("cached, spark", justify="right")
    lost = 0
    for turn, from_dense, from_spark in zip(turns, dense, spark, strict=True):
        dense_right, spark_right = turn.is_correct(from_dense.text), turn.is_correct(from_spark.text)
        lost += dense_right and not spark_right
        table.add_row(
            turn.question,
            marked(from_dense.text, dense_right),
            marked(from_spark.text, spark_right),
            str(from_spark.prompt_tokens),
            str(from_dense.cached_tokens),
            str(from_spark.cached_tokens),
        )
    console.print(table)
    return lost


def marked(text: str, right: bool) -> str:
    return f"[green]✓[/] {text.strip()}" if right else f"[red]✗[/] {text.strip()}"


def print_capacity(console: Console, spark: LocalServer) -> None:
    """What the compressed server reported at start-up, and the settings it serves with."""
    capacity = spark.capacity()
    info = spark.info()
    table = Table(title="KV cache", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("spark", justify="right")
    table.add_row("bytes per token", str(capacity.dense_bytes_per_token), str(capacity.bytes_per_token))
    table.add_row("tokens in the same memory", str(capacity.dense_tokens), str(capacity.tokens))
    table.add_row("", "1.00x", f"{capacity.dense_bytes_per_token / capacity.bytes_per_token:.2f}x")
    console.print(table)
    console.print(
        f"{capacity.kept}; ratio {info['spark_key_ratio']}, {info['spark_restore_bits']} restore bits, "
        f"{capacity.value_dtype} values"
    )


if __name__ == "__main__":
    sys.exit(main())
