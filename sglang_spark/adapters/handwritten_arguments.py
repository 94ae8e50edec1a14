"""SGLang 0.5.10: the arguments are a dataclass, its flags are added to the parser by hand."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from sglang_spark.adapters import dataclass_resolution
from sglang_spark.adapters.dataclass_resolution import (
    add_backend_choice,
    declare,
    keep_request,
    model_config,
    requested,
    resolve,
    resolved,
    wrap_steps,
)
from sglang_spark.adapters.targets import Target

HAS_NAMESPACES = False
# Of the class that adds fields to SGLang's.
CLASS_KEYWORDS: dict[str, Any] = {}

TARGETS = (
    *dataclass_resolution.TARGETS,
    Target("sglang.srt.server_args.ServerArgs.add_cli_args", ("parser",)),
    # Its fields' names are those of the parser's results.
    Target("sglang.srt.server_args.ServerArgs.from_cli_args", ("args",)),
)


class _Flag(NamedTuple):
    """What later releases' ``Arg`` says of a field, as far as SparK's flags need it."""

    help: str


def annotation() -> tuple[Any, Any]:
    """What a field of the arguments is annotated with, ``A[type, Arg(help=...)]``: ``A`` and ``Arg``."""
    return Annotated, _Flag


def complete(cls: type) -> type:
    """Decorates the class that adds fields: makes it a dataclass with flags that keeps what the user gave."""
    annotations = get_type_hints(cls, include_extras=True)
    own = {name: annotations[name] for name in cls.__annotations__}
    cls = dataclasses.dataclass(keep_request(cls))
    add_inherited = cls.add_cli_args

    def add_cli_args(parser: argparse.ArgumentParser):
        add_inherited(parser)
        for name, annotation in own.items():
            kind, flag = get_args(annotation)
            choices = get_args(kind) if get_origin(kind) is Literal else None
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                type=type(choices[0]) if choices else kind,
                choices=choices,
                default=getattr(cls, name),
                help=flag.help.replace("%", "%%"),
            )

    cls.add_cli_args = staticmethod(add_cli_args)
    return cls


__all__ = [
    "CLASS_KEYWORDS",
    "HAS_NAMESPACES",
    "TARGETS",
    "add_backend_choice",
    "annotation",
    "complete",
    "declare",
    "model_config",
    "requested",
    "resolve",
    "resolved",
    "wrap_steps",
]
