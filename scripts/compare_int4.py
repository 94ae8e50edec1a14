#!/usr/bin/env python3
"""Compare ways to store values in 4 bits a channel and 8 bytes of scales a row: the one in use, and those that lost.

Each kind of value is encoded and decoded; reported are the relative errors (root mean square, per cent) of the values
and of what attention with random weights makes of them. The recall model's own values come from one document.

    python scripts/compare_int4.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from spark_kernels import Int4ValueFormat, reference

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from local_server import RECALL_MODEL
from recall_tasks import make_items

TOKENS, QUERIES = 4096, 64
HALF_MAX = torch.finfo(torch.float16).max


def kept(v: torch.Tensor) -> torch.Tensor:
    made = Int4ValueFormat(v.shape[-1])
    return reference.decode_values(reference.encode_values(v, made), made)


def symmetric(v: torch.Tensor, levels: float) -> torch.Tensor:
    """Four groups; 15 levels around zero where ``levels`` is 7, 16 with none at zero where it is 7.5."""
    groups = v.unflatten(-1, (4, -1))
    scale = (groups.abs().amax(-1, keepdim=True) / levels).clamp(max=HALF_MAX).half().float()
    offset = levels % 1
    steps = (groups / scale.clamp(min=1e-30) - offset).round() + offset
    return (steps.clamp(-levels, levels) * scale).flatten(-2)


def with_minimum(v: torch.Tensor) -> torch.Tensor:
    """Two groups; 16 levels from the smallest number to the largest, each group with a scale and a minimum."""
    groups = v.unflatten(-1, (2, -1))
    low = groups.amin(-1, keepdim=True).half().float()
    scale = ((groups.amax(-1, keepdim=True) - low) / 15).clamp(max=HALF_MAX).half().float()
    return (((groups - low) / scale.clamp(min=1e-30)).round().clamp(0, 15) * scale + low).flatten(-2)


CODECS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "4 groups, signed scale (in use)": kept,
    "4 groups, -7 to 7": lambda v: symmetric(v, 7),
    "4 groups, -7.5 to 7.5": lambda v: symmetric(v, 7.5),
    "2 groups, scale and minimum": with_minimum,
}


def generated(head_dim: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Kinds of value, float32 ``[TOKENS, head_dim]``."""
    normal = torch.randn(TOKENS, head_dim)
    yield "Gaussian", normal
    yield "Student's t, 3 degrees of freedom", torch.distributions.StudentT(3.0).sample((TOKENS, head_dim))
    outliers = torch.ones(head_dim)
    outliers[torch.randperm(head_dim)[: head_dim // 64]] = 15
    yield "a channel in 64 15 times as large", normal * outliers
    yield "each channel with its own mean, sd 3", normal + 3 * torch.randn(head_dim)
    yield "all channels with mean 1", normal + 1


def of_recall_model() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Per layer its name, values ``[query heads, tokens, head_dim]`` and attention weights ``[query heads, n, n]``."""
    model = AutoModelForCausalLM.from_pretrained(RECALL_MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(RECALL_MODEL)
    item = make_items("multi_needle", seed=3, count=1, target_tokens=900)[0]
    document = " ".join(message["content"] for message in item.messages(0))
    projected: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, given, out: projected.append(out[0]))
    with torch.no_grad():
        weights = model(tokenizer(document, return_tensors="pt").input_ids, output_attentions=True).attentions
    for layer, (v, w) in enumerate(zip(projected, weights, strict=True)):
        v = v.unflatten(-1, (-1, model.config.head_dim)).transpose(0, 1)
        yield f"recall model, layer {layer}", v.repeat_interleave(w.shape[1] // v.shape[0], 0), w[0]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return 100 * ((actual - expected).norm() / expected.norm()).item()


def add_row(table: Table, name: str, v: torch.Tensor, weights: torch.Tensor) -> None:
    cells = []
    for codec in CODECS.values():
        decoded = codec(v.bfloat16().float())
        cells.append(f"{relative_error(decoded, v):.2f} / {relative_error(weights @ decoded, weights @ v):.2f}")
    table.add_row(name, str(v.shape[-1]), *cells)


def main() -> None:
    torch.manual_seed(0)
    table = Table("values", "head_dim", *CODECS, title="Relative error, %: of values / of attention over them")
    for head_dim in (64, 128, 256):
        for name, v in generated(head_dim):
            v = v.bfloat16().float()
            add_row(table, name, v, (2 * torch.randn(QUERIES, TOKENS)).softmax(-1))
    for name, v, weights in of_recall_model():
        add_row(table, name, v, weights)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
