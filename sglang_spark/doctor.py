"""``python -m sglang_spark.doctor``: would ``--kv-compress spark`` serve here, and what would it store?

    python -m sglang_spark.doctor
    python -m sglang_spark.doctor --model-path meta-llama/Llama-3.1-8B-Instruct --mem 40 --spark-key-ratio 0.9

Starts no server. Exit status: 0 it would serve, 1 it would be refused, 2 the command line is wrong.

Nothing here repeats a fact: the environment is checked by `environment`, arguments are resolved as a server resolves
them, refusals come from `refusals` and sizes from `layout`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from sglang_spark.environment import HOOK, Check, check_environment

SERVES, REFUSED, BAD_USAGE = 0, 1, 2
GIB = 1 << 30


@dataclass(frozen=True)
class Fit:
    """What one process of a server would store per token, and how many tokens that makes.

    Parameters
    ----------
    bytes_per_token
        By cache: ``dense`` in the model's dtype, ``dense_fp8``, and ``spark`` with the flags at hand.
    tokens
        By cache: tokens in the memory that was asked about, None where none was.
    summary
        SparK's formats, as ``/server_info`` shows them.
    calibration
        Where the statistics of keys come from.
    """

    bytes_per_token: dict[str, int]
    tokens: dict[str, int] | None
    summary: dict[str, int]
    calibration: str


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_spark.doctor",
        description="Check whether --kv-compress spark would serve here, without starting a server.",
        epilog="Other flags of sglang.launch_server, such as --spark-key-ratio or --tp-size, are taken into account.",
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", help="model to check; without it, only the environment is checked")
    parser.add_argument("--mem", type=float, metavar="GIB", help="memory of one process's KV cache in GiB")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    own, flags = parser.parse_known_args(arguments)
    if own.mem is not None and own.mem <= 0:
        parser.error(f"--mem={own.mem:g}: must be above 0")
    if own.model_path is None and (flags or own.mem is not None):
        parser.error(f"{' '.join(flags) or '--mem'} needs --model-path")
    fit, refusal, wrong_usage = None, None, None
    with _quiet_sglang() as sglang_said:
        checks = check_environment()
        # The device is judged again with the model: a flag may name another one than was found.
        if own.model_path is not None and all(check.ok for check in checks if check.name != "device"):
            try:
                fit = examine_model(own.model_path, flags, own.mem)
            except SystemExit:
                wrong_usage = sglang_said.getvalue().strip().rpartition("\n")[2]
            except OSError as error:
                wrong_usage = f"--model-path={own.model_path}: {error}"
            except (ValueError, RuntimeError) as error:
                refusal = str(error)
    if wrong_usage is not None:
        parser.exit(BAD_USAGE, f"{wrong_usage}\n")
    serves = fit is not None if own.model_path is not None else all(check.ok for check in checks)
    if own.json:
        print(json.dumps(_as_json(serves, checks, own.model_path, fit, refusal), indent=2))
    else:
        _print_tables(serves, checks, own.model_path, own.mem, fit, refusal)
    return SERVES if serves else REFUSED


def examine_model(model_path: str, flags: list[str], memory_gib: float | None) -> Fit:
    """Resolve the arguments of a server with ``--kv-compress spark`` as that server would, and size its cache.

    Of the stages of a pipeline, the one with the most bytes per token, which limits all.

    Parameters
    ----------
    model_path
        As for ``--model-path``.
    flags
        Further command-line flags of the server.
    memory_gib
        Memory of the KV cache of one process in GiB, or None.

    Raises
    ------
    ValueError
        The server would refuse to start; the message is the server's.
    SystemExit
        SGLang's parser does not know a flag or its value; it has printed which.
    """
    from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
    from sglang.srt.runtime_context import get_schedule, publish
    from sglang.srt.server_args import prepare_server_args

    from sglang_spark.calibration import checked_source
    from sglang_spark.layout import planned_layouts

    arguments = prepare_server_args(["--model-path", model_path, *flags, "--kv-compress", "spark"])
    arguments.resolve_once()
    publish(arguments, role="scheduler")
    resolved, model_config = resolving_view(arguments), model_config_of(arguments)
    layouts = planned_layouts(resolved, model_config)
    layout = max(layouts, key=lambda layout: layout.bytes_per_token)
    bytes_per_token = {
        "dense": layout.dense_bytes_per_token,
        "dense_fp8": layout.dense_bytes_per_token // layout.model_dtype.itemsize,
        "spark": layout.bytes_per_token,
    }
    tokens = None
    if memory_gib is not None:
        page_size = resolved.page_size
        memory = int(memory_gib * GIB)
        # SGLang's share of a pool of window layers, per token of the others.
        beside = layout.windows.bytes_per_token * get_schedule().swa_full_tokens_ratio if layout.windows else 0
        tokens = {
            cache: int(memory // (size + beside)) // page_size * page_size for cache, size in bytes_per_token.items()
        }
    return Fit(bytes_per_token, tokens, layout.sizes(), checked_source(resolved.spark_calibration, model_config))


@contextlib.contextmanager
def _quiet_sglang() -> Iterator[io.StringIO]:
    """Keep what SGLang logs and warns about while it resolves arguments off the screen; yields its standard error.

    SGLang's parser reports a wrong flag below a usage text of 300 lines.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()) as captured:
            warnings.simplefilter("ignore")
            yield captured
    finally:
        logging.disable(disabled)


def _as_json(serves: bool, checks: list[Check], model_path: str | None, fit: Fit | None, refusal: str | None) -> dict:
    return {
        "serves": serves,
        "environment": [asdict(check) for check in checks],
        "model": model_path and {"path": model_path, "refusal": refusal, **(asdict(fit) if fit else {})},
    }


def _print_tables(serves, checks, model_path, memory_gib, fit, refusal) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    environment = Table(title="Environment", title_justify="left", title_style="bold")
    for column in ("", "", "found"):
        environment.add_column(column)
    for check in _hooks_together(checks):
        environment.add_row("[green]✓[/]" if check.ok else "[red]✗[/]", check.name, check.detail)
    console.print(environment)
    if fit is not None:
        console.print(_fit_table(Table, model_path, memory_gib, fit))
        console.print(f"calibration: {fit.calibration}", markup=False, soft_wrap=True)
    if refusal is not None:
        console.print(refusal, style="red", markup=False)
    if serves:
        console.print("[bold green]--kv-compress spark would serve[/]")
    else:
        console.print("[bold red]--kv-compress spark would not serve[/]")


def _hooks_together(checks: list[Check]) -> list[Check]:
    """One line for all hooks that are in place."""
    is_fine = [check.ok and check.name.startswith(HOOK) for check in checks]
    together = Check("hooks into SGLang", True, f"{sum(is_fine)} in place")
    return [check for check, fine in zip(checks, is_fine, strict=True) if not fine] + [together] * any(is_fine)


def _fit_table(table_class, model_path: str, memory_gib: float | None, fit: Fit):
    table = table_class(title=f"KV cache of {model_path}, per process", title_justify="left", title_style="bold")
    table.add_column("")
    columns = {"dense": "dense", "dense_fp8": "dense, fp8", "spark": "spark"}
    for column in columns.values():
        table.add_column(column, justify="right")
    sizes = fit.bytes_per_token
    table.add_row("bytes per token", *(f"{sizes[cache]:,}" for cache in columns))
    table.add_row("tokens against dense", *(f"{sizes['dense'] / sizes[cache]:.2f}x" for cache in columns))
    if beside := fit.summary["window_bytes_per_token"]:
        table.add_row("beside them, in windows", *[f"{beside:,}"] * len(columns))
    if fit.tokens is not None:
        table.add_row(f"tokens in {memory_gib:g} GiB", *(f"{fit.tokens[cache]:,}" for cache in columns))
    return table


if __name__ == "__main__":
    sys.exit(main())
