"""Every setting on every task, each through a server of its own; goes on where it was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from transformers import AutoTokenizer

from accuracy.endpoint import Endpoint
from accuracy.outcomes import DENSE, OutcomeStore, make_comparisons, make_row
from accuracy.references import load_references, save_references
from accuracy.results import Comparison, ResultsFile, Row
from accuracy.server_runs import Interview
from accuracy.settings import Setting, serve
from accuracy.tasks import TASKS


@dataclass(frozen=True)
class Plan:
    """What to ask.

    Parameters
    ----------
    tasks, lengths
        Names from `TASKS`, and document lengths in tokens.
    items, seed
        Documents per task and length, and which.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    items: int
    seed: int

    @property
    def cells(self) -> list[tuple[str, int]]:
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
    interview = Interview(endpoint, AutoTokenizer.from_pretrained(model), exact)
    store = OutcomeStore(files.work, "server")
    cells = _missing(setting, plan, files)
    with Progress() as progress:
        bar = progress.add_task(str(setting.label), total=len(cells) * plan.items)
        for task, length in cells:
            progress.update(bar, description=f"{setting.label}: {task} {length}")
            items = TASKS[task].make(plan.seed, plan.items, length)
            if TASKS[task].own_history:
                outcomes = interview.converse(items, lambda: progress.advance(bar))
            else:
                path = files.work / "references" / f"{task}-{length}-{plan.seed}-{plan.items}.npz"
                references = {} if setting.label == DENSE else load_references(path)
                if setting.label != DENSE and not references:
                    raise RuntimeError(f"{task} at {length} tokens: measure the dense server first ({path} is missing)")
                outcomes = interview.ask(items, references, lambda: progress.advance(bar))
                if setting.label == DENSE:
                    save_references(path, references)
            store.save(setting.label, task, length, outcomes)
            dense = store.load(DENSE, task, length)
            files.comparisons.add(*make_comparisons(setting.label, task, length, outcomes, dense, "server"))
            files.rows.add(make_row(setting.label, size, task, length, outcomes, "server"))


def _missing(setting: Setting, plan: Plan, files: Files) -> list[tuple[str, int]]:
    label = setting.label
    rows = files.rows.find(
        method=label.method,
        key_ratio=label.key_ratio,
        restore_bits=label.restore_bits,
        values=label.values,
        source="server",
    )
    done = {(row.task, row.length) for row in rows}
    return [cell for cell in plan.cells if cell not in done]
