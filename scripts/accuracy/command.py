"""The command line of ``scripts/evaluate_accuracy.py``."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from accuracy.endpoint import Endpoint
from accuracy.jsonl import DEFAULT_LONGBENCH_PROMPT
from accuracy.outcomes import Label
from accuracy.server_campaign import Files, Plan, measure, measure_servers
from accuracy.settings import SETTINGS, Setting
from accuracy.tasks import TASKS, file_task
from local_server import RECALL_MODEL

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "accuracy"
WORK = ROOT / "build" / "accuracy"
BUNDLED_MODEL_ARGUMENTS = ["--max-total-tokens", "32768"]
TRAINED_TASKS = tuple(name for name, task in TASKS.items() if task.trained and not task.own_history)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.run(options)
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        description="Accuracy of compressed KV caches: measure, simulate, and write docs/accuracy.md.",
        epilog="Every command goes on where it was stopped: what the results files already hold is not run again.",
    )
    commands = top.add_subparsers(required=True, metavar="command")
    _add_servers(commands)
    _add_sharing(commands)
    _add_simulate(commands)
    _add_stress(commands)
    _add_report(commands)
    return top


def _add_servers(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("servers", help="ask servers the questions of generated tasks")
    _add_common(command)
    _add_plan(command, TRAINED_TASKS)
    names = [str(setting.label) for setting in SETTINGS]
    command.add_argument("--settings", nargs="+", choices=names, default=names, metavar="SETTING", help=f"of {names}")
    command.add_argument("--files", type=Path, nargs="+", help="LongBench or RULER JSONL files, instead of --tasks")
    command.add_argument("--longbench-prompt", default=DEFAULT_LONGBENCH_PROMPT, help="template of LongBench files")
    command.add_argument("--base-url", help="ask this running server instead of starting any")
    command.add_argument("--label", default="dense", help="method of the running server: `dense`, or any other name")
    command.add_argument("--bytes", type=float, help="bytes of K + V per token and KV head of the running server")
    command.add_argument("--key-ratio", type=float, default=0.0, help="of the running server")
    command.add_argument("--restore-bits", type=int, help="of the running server")
    command.add_argument("--values", default="bf16", help="of the running server")
    command.set_defaults(run=_servers)


def _servers(options: argparse.Namespace) -> None:
    plan, files = _plan(options), Files.open(options.results, options.work)
    exact = _is_bundled(options.model_path)
    if options.base_url is None:
        settings = tuple(setting for setting in SETTINGS if str(setting.label) in options.settings)
        measure_servers(settings, plan, files, options.model_path, _server_arguments(options), exact)
        return
    if options.bytes is None:
        raise SystemExit("--base-url needs --bytes: the bytes of K + V per token and KV head of that server")
    label = Label(options.label, options.key_ratio, options.restore_bits, options.values)
    endpoint = Endpoint(options.base_url)
    measure(Setting(label), endpoint, options.bytes, plan, files, options.model_path, exact)


def _add_sharing(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("sharing", help="ask the same questions under shared, own and evicted prefixes")
    _add_common(command)
    command.add_argument("--length", type=int, default=1024, help="document length in tokens")
    command.add_argument("--items", type=int, default=100, help="documents per task")
    command.add_argument("--seed", type=int, default=200, help="which documents")
    command.set_defaults(run=_sharing)


def _sharing(options: argparse.Namespace) -> None:
    from accuracy.sharing import measure_sharing

    files = Files.open(options.results, options.work)
    arguments = _server_arguments(options)
    measure_sharing(files, options.model_path, arguments, length=options.length, items=options.items, seed=options.seed)


def _add_simulate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("simulate", help="run the baselines on the same model and items")
    _add_common(command)
    _add_plan(command, TRAINED_TASKS)
    command.add_argument("--variants", action="store_true", help="the variants that decide defaults instead")
    command.set_defaults(run=_simulate)


def _simulate(options: argparse.Namespace) -> None:
    from accuracy.simulation import simulate

    files = Files.open(options.results, options.work)
    simulate(_plan(options), files, options.model_path, variants=options.variants)


def _add_stress(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("stress", help="errors on synthetic keys with large models' statistics")
    command.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    command.add_argument("--draws", type=int, default=4, help="heads drawn per kind of keys (times 2)")
    command.set_defaults(run=_stress)


def _stress(options: argparse.Namespace) -> None:
    from accuracy.stress_run import run_stress

    run_stress(options.results, options.draws)


def _add_report(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("report", help="write the tables and plots of docs/accuracy.md from the results")
    command.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    command.add_argument("--work", type=Path, default=WORK, help="folder of what is needed to go on with a run")
    command.add_argument("--document", type=Path, default=ROOT / "docs" / "accuracy.md")
    command.add_argument("--no-plots", action="store_true", help="tables only, without matplotlib")
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    from accuracy.agreement import compare_sources
    from accuracy.report import write_report
    from accuracy.rivals import compare_rivals

    if not options.no_plots and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("the plots need matplotlib: pip install matplotlib, or give --no-plots")
    # Outcomes of single questions are not committed; where they are not, the committed comparison stays.
    files = Files.open(options.results, options.work)
    compare_sources(files)
    compare_rivals(files)
    write_report(options.document, options.results, plots=not options.no_plots)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model-path", default=str(RECALL_MODEL), help="model folder or name (default: the bundled)")
    command.add_argument("--server-arguments", default="", help="further arguments of each server, in one string")
    command.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    command.add_argument("--work", type=Path, default=WORK, help="folder of what is needed to go on with a run")


def _add_plan(command: argparse.ArgumentParser, tasks: tuple[str, ...]) -> None:
    command.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=tasks)
    command.add_argument("--lengths", type=int, nargs="+", default=[512, 1024], help="document lengths in tokens")
    command.add_argument("--items", type=int, default=40, help="documents per task and length")
    command.add_argument("--seed", type=int, default=100, help="which documents")


def _plan(options: argparse.Namespace) -> Plan:
    if getattr(options, "files", None):
        tasks = tuple(file_task(path, options.longbench_prompt) for path in options.files)
        return Plan(tasks, (0,), options.items, options.seed)
    tasks = tuple(TASKS[name] for name in options.tasks)
    return Plan(tasks, tuple(options.lengths), options.items, options.seed)


def _is_bundled(model: str) -> bool:
    return Path(model).resolve() == RECALL_MODEL


def _server_arguments(options: argparse.Namespace) -> list[str]:
    given = options.server_arguments.split()
    return BUNDLED_MODEL_ARGUMENTS + given if _is_bundled(options.model_path) else given
