#!/usr/bin/env python3
"""An SGLang frontend program: one long document, a branch per question, and the answers joined.

All branches read the document from the same slots of the compressed cache. Starts a server on the bundled model, or
talks to the one at ``--url``.
"""

from __future__ import annotations

import argparse

import sglang as sgl

from local_server import Reply, serving
from recall_tasks import RecallItem, make_items

MAX_ANSWER_TOKENS = 32


@sgl.function
def forked_questions(s, item: RecallItem):
    """One branch per question; after the join, ``s["answer"]`` lists their answers."""
    s += item.document
    s += "\n"
    # fork() prefills the common text once for all branches, but only what has been rendered by then.
    s.sync()
    branches = s.fork(len(item.turns))
    for branch, turn in zip(branches, item.turns, strict=True):
        branch += f"Question: {turn.question}\nAnswer:"
        branch += sgl.gen("answer", max_tokens=MAX_ANSWER_TOKENS, temperature=0, stop="\n")
    s["meta"] = [branch.get_meta_info("answer") for branch in branches]
    branches.join()


def ask_in_forks(url: str, item: RecallItem) -> list[Reply]:
    """Run `forked_questions` on a server."""
    state = forked_questions.run(item=item, backend=sgl.RuntimeEndpoint(url))
    return [
        Reply(answer, meta["cached_tokens"], meta["prompt_tokens"])
        for answer, meta in zip(state["answer"], state["meta"], strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server, such as http://127.0.0.1:30000")
    options = parser.parse_args(arguments)
    item = make_items("multi_needle", seed=11, count=1, target_tokens=900, questions=4)[0]
    with serving(options.url, "--kv-compress", "spark") as url:
        for turn, reply in zip(item.turns, ask_in_forks(url, item), strict=True):
            print(f"{turn.question}\n  {reply.text.strip()}  [{reply.cached_tokens} of {reply.prompt_tokens} cached]")


if __name__ == "__main__":
    main()
