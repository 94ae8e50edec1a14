#!/usr/bin/env python3
"""A batch of prompts without a server: ``sglang.Engine`` takes the flags as keywords.

python examples/offline_engine.py [--model-path meta-llama/Llama-3.1-8B-Instruct]
"""

from __future__ import annotations

import argparse

import sglang as sgl

from local_server import RECALL_MODEL
from recall_tasks import make_items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=str(RECALL_MODEL))
    options = parser.parse_args()
    items = make_items("single_needle", seed=12, count=4, target_tokens=400)
    with sgl.Engine(
        model_path=options.model_path, kv_compress="spark", spark_key_ratio=0.8, max_total_tokens=8192
    ) as engine:
        outputs = engine.generate([item.plain_prompt() for item in items], {"temperature": 0, "max_new_tokens": 16})
        for item, output in zip(items, outputs, strict=True):
            print(f"{item.turns[0].question}\n  {output['text'].strip()}")


# SGLang starts its processes with spawn, which imports this file again.
if __name__ == "__main__":
    main()
