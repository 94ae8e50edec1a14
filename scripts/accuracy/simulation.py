"""Every baseline on the same model, items and answers as the servers, by a plain forward over what it would store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from accuracy.outcomes import DENSE, Outcome, OutcomeStore, make_comparisons, make_row
from accuracy.server_campaign import Files, Plan
from accuracy.server_runs import expected_ids, prompt_ids
from accuracy.tasks import Item
from baselines import METHODS, ChannelStatistics, decision_variants
from baselines.base import Chunk, Method
from baselines.simulated_cache import SimulatedCache, forward, load_model
from recall_tasks import make_items

CALIBRATION_SEED = 30_000
CALIBRATION_DOCUMENTS = 8


@dataclass(frozen=True)
class Conversation:
    """An item's token ids: the prompt of each turn and the answer that is scored."""

    prompts: list[list[int]]
    answers: list[list[int]]


@dataclass
class Prefill:
    """The exact prefill of a first prompt, which is the same for every method: what each layer stores of it, and the
    log-probabilities ``[vocabulary]`` after it."""

    chunks: list[Chunk]
    logprobs: torch.Tensor


class Simulator:
    """One model asked under different methods."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        self.num_layers = model.config.num_hidden_layers

    def conversation(self, item: Item) -> Conversation:
        answers = [expected_ids(self.tokenizer, question) for question in item.questions]
        if None in answers:
            raise ValueError("simulated questions need an expected answer")
        return Conversation([prompt_ids(self.tokenizer, question) for question in item.questions], answers)

    def prefill(self, conversation: Conversation) -> Prefill:
        cache = SimulatedCache(Method(), self.num_layers)
        logprobs = forward(self.model, [cache], conversation.prompts[0], decoding=False, logits_to_keep=1)[0, -1]
        return Prefill(cache.last_chunks, logprobs)

    def answer(
        self, conversation: Conversation, prefill: Prefill, methods: Sequence[Method]
    ) -> list[list[torch.Tensor]]:
        """Per method and turn, log-probabilities ``[answer tokens, vocabulary]`` before each token of the answer."""
        caches = [SimulatedCache(method, self.num_layers) for method in methods]
        for cache in caches:
            cache.start_from(prefill.chunks)
        steps: list[list[torch.Tensor]] = [[] for _ in methods]
        for turn, (prompt, answer) in enumerate(zip(conversation.prompts, conversation.answers, strict=True)):
            first = prefill.logprobs.expand(len(caches), 1, -1)
            if turn:
                first = forward(self.model, caches, prompt[caches[0].tokens :], decoding=False, logits_to_keep=1)
            # The last token of an answer is never read by the server either.
            parts = [first]
            if len(answer) > 1:
                parts.append(forward(self.model, caches, answer[:-1], decoding=True))
            for mine, logprobs in zip(steps, torch.cat(parts, 1), strict=True):
                mine.append(logprobs)
        return steps


def judge(item: int, conversation: Conversation, steps: list[torch.Tensor], dense: list[torch.Tensor]) -> list[Outcome]:
    """Outcomes of one conversation; greedy decoding gives the answer exactly if each token is the likeliest."""
    outcomes = []
    for answer, ours, theirs in zip(conversation.answers, steps, dense, strict=True):
        top = ours.argmax(-1)
        hits = top == torch.tensor(answer)
        kl = (theirs.exp() * (theirs - ours)).sum(-1).clamp(min=0)
        outcomes.append(
            Outcome(
                item=item,
                right=float(hits.all()),
                token_hits=tuple(hits.tolist()),
                agrees=tuple((top == theirs.argmax(-1)).tolist()),
                kl=tuple(round(number, 7) for number in kl.tolist()),
            )
        )
    return outcomes


def simulate(plan: Plan, files: Files, model_path: str, *, variants: bool) -> None:
    """Rows of all methods, or of the variants that decide defaults; goes on where it was stopped."""
    simulator = Simulator(load_model(model_path), AutoTokenizer.from_pretrained(model_path))
    methods = (Method(), *decision_variants(calibrate(simulator))) if variants else METHODS
    store = OutcomeStore(files.work, "simulation")
    with Progress() as progress:
        for task, length in plan.cells:
            missing = [method for method in methods if store.load(method.label, task.name, length) is None]
            bar = progress.add_task(f"{task.name} {length}", total=plan.items if missing else 0)
            items = task.make(plan.seed, plan.items, length) if missing else []
            found = answer_all(simulator, items, missing, lambda bar=bar: progress.advance(bar))
            for method, outcomes in found.items():
                store.save(method.label, task.name, length, outcomes)
            _add_rows(methods, task.name, length, files, store, simulator.model.config.head_dim)


def answer_all(
    simulator: Simulator, items: list[Item], methods: list[Method], on_item: Callable[[], None]
) -> dict[Method, list[Outcome]]:
    """Outcomes of every method on every item; an item's exact prefill serves all methods."""
    outcomes: dict[Method, list[Outcome]] = {method: [] for method in methods}
    for number, item in enumerate(items):
        conversation = simulator.conversation(item)
        prefill = simulator.prefill(conversation)
        # The dense cache again, first, because every method is compared with it on the same item.
        dense, *steps = simulator.answer(conversation, prefill, [Method(), *methods])
        for method, found in zip(methods, steps, strict=True):
            outcomes[method] += judge(number, conversation, found, dense)
        on_item()
    return outcomes


def _add_rows(
    methods: Sequence[Method], task: str, length: int, files: Files, store: OutcomeStore, head_dim: int
) -> None:
    dense = store.load(DENSE, task, length)
    rows, comparisons = [], []
    for method in methods:
        outcomes = store.load(method.label, task, length)
        size = method.bytes_per_token_head(head_dim)
        rows.append(make_row(method.label, size, task, length, outcomes, "simulation"))
        comparisons += make_comparisons(method.label, task, length, outcomes, dense, "simulation")
    files.comparisons.add(*comparisons)
    files.rows.add(*rows)


def calibrate(simulator: Simulator) -> ChannelStatistics:
    """Statistics of keys in documents that no task asks about."""
    keys: list[list[torch.Tensor]] = [[] for _ in range(simulator.num_layers)]
    for item in make_items("multi_turn", CALIBRATION_SEED, CALIBRATION_DOCUMENTS, 1000):
        cache = SimulatedCache(Method(), simulator.num_layers)
        ids = simulator.tokenizer.encode(item.document, add_special_tokens=False)
        forward(simulator.model, [cache], ids, decoding=False, logits_to_keep=1)
        for chunk in cache.last_chunks:
            keys[chunk.layer].append(chunk.k)
    return ChannelStatistics.of([torch.cat(layer) for layer in keys])
