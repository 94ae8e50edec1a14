"""Curriculum, optimisers and learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

MATRIX_RATE = 3e-3
VECTOR_RATE = 6e-4
"""Peak rates of Muon and AdamW; three times as much keeps answers from being learned, a third learns them slower."""
WEIGHT_DECAY = 0.01
WARMUP_STEPS = 20
FINAL_RATE = 0.03
"""Fraction of the peak rates that remains at the end of the decay."""


@dataclass(frozen=True)
class Stage:
    """Steps on sequences of one length; `decays` stages share one linear decay of the learning rate."""

    length: int
    sequences: int
    steps: int
    decays: bool = False


CURRICULUM = (
    Stage(length=192, sequences=16, steps=250),
    Stage(length=512, sequences=6, steps=450, decays=True),
    Stage(length=1024, sequences=3, steps=560, decays=True),
    Stage(length=2048, sequences=2, steps=140, decays=True),
)


def total_steps(curriculum: tuple[Stage, ...]) -> int:
    return sum(stage.steps for stage in curriculum)


def scaled(curriculum: tuple[Stage, ...], steps: int) -> tuple[Stage, ...]:
    """`curriculum` shortened or stretched to `steps` in all; the last stage takes the rounding."""
    factor = steps / total_steps(curriculum)
    stages = [replace(stage, steps=round(stage.steps * factor)) for stage in curriculum]
    stages[-1] = replace(stages[-1], steps=steps - total_steps(tuple(stages[:-1])))
    return tuple(stages)


def stage_at(curriculum: tuple[Stage, ...], step: int) -> Stage:
    for stage in curriculum:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise IndexError("step lies beyond the curriculum")


def rate_at(curriculum: tuple[Stage, ...], step: int) -> float:
    """Factor on the peak learning rates: a warm-up, a plateau, then a decay to `FINAL_RATE`."""
    decay_steps = sum(stage.steps for stage in curriculum if stage.decays)
    remaining = total_steps(curriculum) - step
    decay = FINAL_RATE + (1 - FINAL_RATE) * min(1.0, remaining / decay_steps)
    return min(1.0, (step + 1) / WARMUP_STEPS) * decay


class Optimisers:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""

    def __init__(self, model: nn.Module) -> None:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        parameters = list(model.parameters())
        matrices = [p for p in parameters if p.ndim == 2 and id(p) not in embeddings]
        others = [p for p in parameters if p.ndim != 2 or id(p) in embeddings]
        self._members = {
            "muon": (torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY), MATRIX_RATE),
            "adamw": (torch.optim.AdamW(others, lr=VECTOR_RATE, weight_decay=0.0), VECTOR_RATE),
        }

    def step(self, rate: float) -> None:
        """One update with both peak rates multiplied by `rate`; clears the gradients."""
        for optimiser, peak in self._members.values():
            for group in optimiser.param_groups:
                group["lr"] = peak * rate
            optimiser.step()
            optimiser.zero_grad()

    def state_dict(self) -> dict[str, dict]:
        return {name: optimiser.state_dict() for name, (optimiser, _) in self._members.items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        for name, (optimiser, _) in self._members.items():
            optimiser.load_state_dict(state[name])
