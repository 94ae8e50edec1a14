#!/usr/bin/env python3
"""An answer that arrives piece by piece, through the OpenAI client.

Starts a server on the bundled model, or talks to the one at ``--url``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import openai

from local_server import serving
from recall_tasks import RecallItem, make_items


def stream(url: str, item: RecallItem) -> Iterator[str]:
    """The pieces of the answer to the item's first question."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    chunks = client.chat.completions.create(
        model="default", messages=item.messages(0), temperature=0, max_tokens=32, stream=True
    )
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server, such as http://127.0.0.1:30000")
    options = parser.parse_args(arguments)
    item = make_items("single_needle", seed=11, count=1, target_tokens=900)[0]
    with serving(options.url, "--kv-compress", "spark") as url:
        print(item.turns[0].question)
        for piece in stream(url, item):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
