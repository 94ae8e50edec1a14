#!/usr/bin/env python3
"""A chat of several turns over a long document, through the OpenAI client.

Every turn sends the whole conversation again; the server finds all of it but the last question in its radix cache,
as compressed rows. Starts a server on the bundled model, or talks to the one at ``--url``.
"""

from __future__ import annotations

import argparse

import openai

from local_server import Reply, serving
from recall_tasks import RecallItem, make_items

MAX_ANSWER_TOKENS = 32


def chat(url: str, item: RecallItem) -> list[Reply]:
    """Ask the item's questions in one conversation, which goes on from the server's own answers."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    messages = item.messages(0)[:-1]
    replies = []
    for turn in range(len(item.turns)):
        messages.append(item.messages(turn)[-1])
        response = client.chat.completions.create(
            model="default", messages=messages, temperature=0, max_tokens=MAX_ANSWER_TOKENS
        )
        replies.append(Reply.of(response))
        messages.append({"role": "assistant", "content": replies[-1].text})
    return replies


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server, such as http://127.0.0.1:30000")
    options = parser.parse_args(arguments)
    item = make_items("multi_turn", seed=11, count=1, target_tokens=900, questions=4)[0]
    with serving(options.url, "--kv-compress", "spark") as url:
        for turn, reply in zip(item.turns, chat(url, item), strict=True):
            print(f"{turn.question}\n  {reply.text.strip()}  [{reply.cached_tokens} of {reply.prompt_tokens} cached]")


if __name__ == "__main__":
    main()
