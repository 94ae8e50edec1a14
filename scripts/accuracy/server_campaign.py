"""Every setting on every task, each through a server of its own; goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer

from accuracy.endpoint import Endpoint
from accuracy.outcomes import DENSE, Label, Outcome, OutcomeStore, make_comparisons, make_row
from accuracy.references import load_references, save_references
from accuracy.results import Comparison, ResultsFile, Row
from accuracy.server_runs import Interview
from accuracy.settings import Setting, serve
from accuracy.tasks import Item, Task


@dataclass(frozen=True)
class Plan:
    """What to ask.

    Parameters
    ----------
    tasks, lengths
        What is asked, and document lengths in tokens.
    items, seed
        Documents per task and length, and which.
    """

    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    items: int
    seed: int

    @property
    def cells(self) -> list[tuple[Task, int]]:
        return [(task, length) for length in self.lengths for task in self.tasks]


@dataclass(frozen=True)
class Files:
    """The committed results, and the folder of what is needed to go on with a run."""

    rows: ResultsFile[Row]
    comparisons: ResultsFile[Comparison]
    work: Path

    @classmethod
    def open(cls, folder: Path, work: Path) -> Files:
        rows = ResultsFile(folder / "results.json", Row)
        return cls(rows, ResultsFile(folder / "comparisons.json", Comparison), work)


def measure_servers(
    settings: tuple[Setting, ...], plan: Plan, files: Files, model: str, arguments: list[str], exact: bool
) -> None:
    """Dense first, because the others are compared with it; a server starts only if something is missing."""
    console = Console()
    for setting in sorted(settings, key=lambda setting: setting.label != DENSE):
        if not _missing(setting, plan, files):
            console.print(f"{setting.label}: already measured")
            continue
        console.print(f"{setting.label}: starting the server")
        with serve(setting, model, arguments) as (endpoint, size):
            measure(setting, endpoint, size, plan, files, model, exact)


def measure(
    setting: Setting, endpoint: Endpoint, size: float, plan: Plan, files: Files, model: str, exact: bool
) -> None:
    """One setting, asked through a running server; rows are written as each task is done.

    Raises
    ------
    RuntimeError
        The dense server has not been measured on these questions.
    """
    tokenizer = AutoTokenizer.from_pretrained(model) if endpoint.has_logprobs() else None
    interview = Interview(endpoint, tokenizer, exact)
    store = OutcomeStore(files.work, "server")
    label, cells = setting.label, _missing(setting, plan, files)
    with Progress() as progress:
        bar = progress.add_task(str(label), total=len(cells) * plan.items)
        for task, length in cells:
            progress.update(bar, description=f"{label}: {task.name} {length}")
            path = files.work / "references" / f"{task.name}-{length}-{plan.seed}-{plan.items}.npz"
            items = task.make(plan.seed, plan.items, length)
            outcomes = _outcomes(interview, task, items, label, path, lambda: progress.advance(bar))
            store.save(label, task.name, length, outcomes)
            dense = store.load(DENSE, task.name, length)
            files.comparisons.add(*make_comparisons(label, task.name, length, outcomes, dense, "server"))
            files.rows.add(make_row(label, size, task.name, length, outcomes, "server"))


def _outcomes(
    interview: Interview, task: Task, items: list[Item], label: Label, path: Path, on_item: Callable[[], None]
) -> list[Outcome]:
    if task.own_history:
        return interview.converse(items, on_item)
    references = {} if label == DENSE else load_references(path)
    if not references and label != DENSE and interview.tokenizer:
        raise RuntimeError(f"{task.name}: measure the dense server on the same items first ({path} is missing)")
    outcomes = interview.ask(items, references, on_item)
    if references and label == DENSE:
        save_references(path, references)
    return outcomes


def _missing(setting: Setting, plan: Plan, files: Files) -> list[tuple[Task, int]]:
    label = setting.label
    rows = files.rows.find(
        method=label.method,
        key_ratio=label.key_ratio,
        restore_bits=label.restore_bits,
        values=label.values,
        source="server",
    )
    done = {(row.task, row.length) for row in rows}
    return [(task, length) for task, length in plan.cells if (task.name, length) not in done]
