"""What it costs that a prefix is shared: the same question under prefixes with different histories.

A row keeps the channels that mattered to the queries of the chunk that first computed it, and a cached prefix is read
as restored. The conditions take these two apart.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from rich.progress import Progress
from transformers import AutoTokenizer

from accuracy.endpoint import Endpoint
from accuracy.metrics import estimate, paired_difference
from accuracy.outcomes import DENSE, Label, Outcome, OutcomeStore, comparison
from accuracy.results import Comparison
from accuracy.server_campaign import Files
from accuracy.server_runs import CONCURRENT_REQUESTS, Interview, Reference, follow, prompt_ids
from accuracy.settings import SETTINGS, serve
from accuracy.tasks import Question
from recall_tasks import RecallItem, make_items

TASKS = ("multi_turn", "kv_list")
SETTING_LABELS = (DENSE, Label("spark", 0.8, 2), Label("spark", 0.8, 1))
OWN, SAME, OTHER, EVICTED = "own question", "same question before", "other question before", "evicted and recomputed"
CONDITIONS = (OWN, SAME, OTHER, EVICTED)
CONTRASTS = ((SAME, OWN), (OTHER, OWN), (OTHER, SAME), (EVICTED, OWN))
# Of a prompt that nobody has asked: its system prompt may be cached.
FEW_TOKENS = 64
EVICTION_SEED = 40_000


@dataclass(frozen=True)
class SharedDocument:
    """A document with the question that is measured, and with the same and another one in another spelling."""

    asked: Question
    same: Question
    other: Question


class ConditionNotMet(RuntimeError):
    """The server's cache was not in the state that a condition is about."""


def measure_sharing(files: Files, model: str, arguments: list[str], *, length: int, items: int, seed: int) -> None:
    """Comparisons of the conditions, for dense and spark; goes on where it was stopped.

    Raises
    ------
    ConditionNotMet
        Cached tokens as the server reports them do not fit the condition.
    """
    store = OutcomeStore(files.work / "sharing", "server")
    tokenizer = AutoTokenizer.from_pretrained(model)
    references: dict[tuple[str, int], Reference] = {}
    cells = [(task, condition) for task in TASKS for condition in CONDITIONS]
    missing = [label for label in SETTING_LABELS if not all(store.load(label, f"{t} {c}", length) for t, c in cells)]
    # The dense server, first of the settings, makes the references of the others.
    wanted = {DENSE, *missing} if missing else set()
    for setting in (setting for setting in SETTINGS if setting.label in wanted):
        with serve(setting, model, arguments) as (endpoint, _), Progress() as progress:
            bar = progress.add_task(f"sharing: {setting.label}", total=len(cells))
            interview = Interview(endpoint, tokenizer, exact=True)
            for task, condition in cells:
                documents = [shared_document(item) for item in make_items(task, seed, items, length, questions=2)]
                outcomes = ask_condition(interview, documents, condition, task, references)
                store.save(setting.label, f"{task} {condition}", length, outcomes)
                progress.advance(bar)
    for label in SETTING_LABELS:
        for task in TASKS:
            found = {condition: store.load(label, f"{task} {condition}", length) for condition in CONDITIONS}
            files.comparisons.add(*compare(label, task, length, found))


def compare(label: Label, task: str, length: int, found: dict[str, list[Outcome]]) -> list[Comparison]:
    """Each condition's exact match and divergence, and the paired differences between conditions."""
    numbers = {
        condition: {
            "exact_match": [outcome.right for outcome in outcomes],
            "kl": [sum(outcome.kl) / len(outcome.kl) for outcome in outcomes],
        }
        for condition, outcomes in found.items()
    }
    rows = []
    for metric in ("exact_match", "kl"):
        for condition in CONDITIONS:
            value = estimate(numbers[condition][metric])
            rows.append(comparison(label, task, length, f"{metric}, {condition}", "sharing", value, "server"))
        for one, another in CONTRASTS:
            value = paired_difference(numbers[one][metric], numbers[another][metric])
            rows.append(comparison(label, task, length, f"{metric}, {one}", f"sharing, {another}", value, "server"))
    return rows


def shared_document(item: RecallItem) -> SharedDocument:
    """From an item with two questions."""
    asked, other = (_as_first(item, turn) for turn in (0, 1))
    return SharedDocument(asked, _spelled(item, asked, 0), _spelled(item, other, 1))


def _spelled(item: RecallItem, question: Question, turn: int) -> Question:
    """With a second line break, which ends the prefix that prompts share right after the document."""
    *before, message = question.messages
    content = f"{item.document}\n\n{item.turns[turn].question}"
    return replace(question, messages=(*before, {**message, "content": content}))


def _as_first(item: RecallItem, turn: int) -> Question:
    asked = item.turns[turn]
    return Question(tuple(replace(item, turns=(asked,)).messages()), asked.answer, (asked.value,))


def ask_condition(
    interview: Interview,
    documents: list[SharedDocument],
    condition: str,
    task: str,
    references: dict[tuple[str, int], Reference],
) -> list[Outcome]:
    """Brings the cache into the state of `condition` and asks; the first to ask makes the references.

    Raises
    ------
    ConditionNotMet
        The server reports another number of cached tokens.
    """
    endpoint, tokenizer = interview.endpoint, interview.tokenizer

    def outcome(number: int) -> Outcome:
        document = documents[number]
        prompt = prompt_ids(tokenizer, document.asked)
        if condition in (SAME, OTHER):
            before = document.same if condition == SAME else document.other
            endpoint.generate(prompt_ids(tokenizer, before), max_new_tokens=1)
        expected = tokenizer.encode(document.asked.answer, add_special_tokens=False)
        followed = follow(endpoint, prompt, expected)
        _check(condition, followed.cached_tokens, len(prompt))
        # Made by the first setting and condition: dense, on its own question.
        reference = references.setdefault((task, number), Reference(expected, followed.steps))
        return interview.judge(number, document.asked, followed, reference)

    endpoint.flush_cache()
    if condition == EVICTED:
        prompts = [prompt_ids(tokenizer, document.asked) for document in documents]
        _fill(endpoint, prompts)
        _fill(endpoint, _others(interview, sum(map(len, prompts)) // len(prompts)))
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        return list(pool.map(outcome, range(len(documents))))


def _fill(endpoint: Endpoint, prompts: list[list[int]]) -> None:
    """Ask everything once, so that it is cached and what was there before is evicted if there is no room."""
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        list(pool.map(lambda prompt: endpoint.generate(prompt, max_new_tokens=1), prompts))


def _others(interview: Interview, length: int) -> list[list[int]]:
    """Prompts about other documents, as many as the cache has room for and some more."""
    count = interview.endpoint.capacity() // length + CONCURRENT_REQUESTS
    items = make_items("single_needle", EVICTION_SEED, count, length)
    return [prompt_ids(interview.tokenizer, _as_first(item, 0)) for item in items]


def _check(condition: str, cached: int, prompt: int) -> None:
    shared = condition in (SAME, OTHER)
    if shared == (cached <= FEW_TOKENS) or (shared and cached > prompt - 8):
        raise ConditionNotMet(f"{condition}: {cached} of {prompt} prompt tokens came from the cache")
