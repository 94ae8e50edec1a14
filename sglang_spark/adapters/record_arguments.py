"""SGLang 0.5.20 on: the arguments are a record, and steps of their resolution are wrapped by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglang_spark.adapters.targets import Target

# Each field of a record belongs to a namespace, from which every process reads it.
HAS_NAMESPACES = True
# Of the class that adds fields to SGLang's.
CLASS_KEYWORDS = {"dict": True}

_OVERRIDES = "sglang.srt.arg_groups.overrides"

# Of fields, and of arguments that are resolved after they were made.
RESOLUTION_TARGETS = (
    Target("sglang.srt.arg_groups.arg_utils.A"),
    Target("sglang.srt.arg_groups.arg_utils.Arg"),
    Target(f"{_OVERRIDES}.declare_resolution", ("server_args", "source", "**fields")),
    Target(f"{_OVERRIDES}.resolving_view"),
    Target(f"{_OVERRIDES}.model_config_of"),
)

TARGETS = (
    *RESOLUTION_TARGETS,
    Target("sglang.srt.arg_groups.choices.add_attention_backend_choices"),
    Target("sglang.srt.arg_groups.resolution_hooks.register_resolution_hook", ("name",)),
)


def annotation() -> tuple[Any, Any]:
    """What a field of the arguments is annotated with, ``A[type, Arg(help=...)]``: ``A`` and ``Arg``."""
    from sglang.srt.arg_groups.arg_utils import A, Arg

    return A, Arg


def complete(cls: type) -> type:
    """Decorates the class that adds fields; a record needs nothing more."""
    return cls


def wrap_steps(cls: type, steps: Mapping[str, Callable[[Any, Callable], None]]) -> None:
    """Let ``wrapper(server_args, previous)`` run in the place of each named step of the resolution."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    for step, wrapper in steps.items():
        register_resolution_hook(step)(wrapper)


def add_backend_choice(name: str) -> None:
    """Accept ``name`` for ``--attention-backend``."""
    from sglang.srt.arg_groups.choices import add_attention_backend_choices

    add_attention_backend_choices([name])


def resolve(server_args: Any) -> None:
    """Run all steps of the resolution, as a starting server does."""
    server_args.resolve_once()


def requested(server_args: Any) -> dict[str, Any]:
    """Arguments as the user gave them, by field name."""
    return server_args._raw_input


def resolved(server_args: Any) -> Any:
    """Arguments as SGLang has resolved them so far."""
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def model_config(server_args: Any) -> Any:
    """SGLang's ``ModelConfig`` of the model that is to be served."""
    from sglang.srt.arg_groups.overrides import model_config_of

    return model_config_of(server_args)


def declare(server_args: Any, **fields: Any) -> None:
    """Decide fields, for the steps that follow and for the server."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, "sglang_spark", **fields)
