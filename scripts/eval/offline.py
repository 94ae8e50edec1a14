#!/usr/bin/env python3
"""What a stored cache does to a real model's next tokens: KL to the exact cache, loss, and the likeliest token.

A document's first tokens are prefilled exactly and stored by each method; the tokens after them are then decoded over
what was stored, each stored first itself, all of them teacher-forced in one forward. Documents are chapters of Python's
own documentation, which no calibration has seen. ``--offset`` moves all positions, to reach those of long contexts.

    python scripts/eval/offline.py --model models/smollm2-135m -o smollm2-135m.json
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.cache import SimulatedCache, forward, load_model
from eval.methods import RIVALS, Method, recipes
from sglang_spark.calibration import Calibration, Model
from sglang_spark.calibration_text import STRETCHES

STRETCH_TOKENS = 64
# Tokens between the starts of two documents.
STEP = 9000


def documents(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[list[int]]:
    """Token ids of ``count`` stretches of Python's documentation."""
    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    ids = tokenizer.encode(text, add_special_tokens=False)
    if (count - 1) * STEP + length > len(ids):
        raise SystemExit(f"--documents={count} of {length} tokens: the text has {len(ids)} tokens")
    return [ids[i * STEP : i * STEP + length] for i in range(count)]


def calibrate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int) -> Calibration:
    """What a server measures at start-up: keys and queries of the bundled text, spread over the context length."""
    layers = model.config.num_hidden_layers
    keys, queries = ([[] for _ in range(layers)] for _ in range(2))
    for number, stretch in enumerate(STRETCHES):
        ids = tokenizer(stretch)["input_ids"][:STRETCH_TOKENS]
        offset = number * (context - STRETCH_TOKENS) // (len(STRETCHES) - 1)
        cache = SimulatedCache(Method(), layers)
        forward(model, [cache], ids, decoding=False, logits_to_keep=1, offset=offset)
        for chunk in cache.last_chunks:
            keys[chunk.layer].append(chunk.k)
            queries[chunk.layer].append(chunk.q)
    statistics = []
    for k, q in zip(map(torch.cat, keys), map(torch.cat, queries), strict=True):
        by_head = q.unflatten(1, (k.shape[1], -1))
        statistics.append((k.mean(0), k.std(0, correction=0), by_head.square().mean((0, 2)).sqrt()))
    heads = model.config
    of = Model(heads.model_type, heads.hidden_size, layers, heads.num_attention_heads, k.shape[1], k.shape[2], 0)
    return Calibration.of(of, *map(torch.stack, zip(*statistics, strict=True)))


def measure(
    model: PreTrainedModel, ids: list[int], prefix: int, methods: list[Method], offset: int
) -> list[dict[str, float]]:
    """Of each method on one document: mean KL to the exact cache, loss beyond it, and agreement on the likeliest."""
    layers = model.config.num_hidden_layers
    exact = SimulatedCache(Method(), layers)
    forward(model, [exact], ids[:prefix], decoding=False, logits_to_keep=1, offset=offset)
    chunks, after = exact.last_chunks, torch.tensor(ids[prefix + 1 :])

    def logprobs(method: Method) -> torch.Tensor:
        cache = SimulatedCache(method, layers)
        cache.start_from(chunks)
        return forward(model, [cache], ids[prefix:], decoding=True, offset=offset)[0]

    def loss(of: torch.Tensor) -> torch.Tensor:
        return -of[:-1].gather(1, after[:, None]).mean()

    dense = logprobs(Method())
    results = []
    for method in methods:
        ours = logprobs(method)
        results.append(
            {
                "kl": (dense.exp() * (dense - ours)).sum(-1).clamp(min=0).mean().item(),
                "loss": (loss(ours) - loss(dense)).item(),
                "top1": (ours.argmax(-1) == dense.argmax(-1)).float().mean().item(),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder, or a name that transformers loads")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--prefix", type=int, default=1000, help="tokens stored by the exact prefill (%(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens decoded after it (%(default)s)")
    parser.add_argument("--offset", type=int, default=0, help="added to all positions (%(default)s)")
    parser.add_argument("--ours-only", action="store_true", help="leave the rivals out")
    arguments = parser.parse_args()
    console = Console()
    model, tokenizer = load_model(arguments.model), AutoTokenizer.from_pretrained(arguments.model)
    context = min(model.config.max_position_embeddings, 32768)
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    with torch.inference_mode():
        calibration = calibrate(model, tokenizer, context)
        methods = [*recipes(head_dim, calibration), *(() if arguments.ours_only else RIVALS)]
        found: list[list[dict[str, float]]] = []
        for ids in documents(tokenizer, arguments.documents, arguments.prefix + arguments.tokens):
            found.append(measure(model, ids, arguments.prefix, methods, arguments.offset))
            console.log(f"{len(found)} of {arguments.documents} documents")
    rows = []
    for number, method in enumerate(methods):
        means = {
            name: sum(document[number][name] for document in found) / len(found) for name in ("kl", "loss", "top1")
        }
        size = {"key_bytes": method.key_bytes(head_dim), "value_bytes": method.value_bytes(head_dim)}
        rows.append({"method": method.name, **size, **means})
        console.print(f"{method.name:28} {sum(size.values()):6.0f} B  KL {means['kl']:.4f}  top-1 {means['top1']:.3f}")
    settings = {"model": Path(arguments.model).name, "head_dim": head_dim, "offset": arguments.offset}
    settings |= {"documents": arguments.documents, "prefix": arguments.prefix, "tokens": arguments.tokens}
    arguments.output.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
