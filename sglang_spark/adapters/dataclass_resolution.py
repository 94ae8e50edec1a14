"""Arguments that are a dataclass and resolve themselves, method by method, when they are made: SGLang up to 0.5.18."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from sglang_spark.adapters.targets import Target

_ARGUMENTS = "sglang.srt.server_args"

TARGETS = (
    Target(f"{_ARGUMENTS}.add_attention_backend_choices", ("choices",)),
    Target(f"{_ARGUMENTS}.ServerArgs.__post_init__", ("self",)),
    Target(f"{_ARGUMENTS}.ServerArgs._handle_missing_default_values", ("self",)),
    Target(f"{_ARGUMENTS}.ServerArgs._handle_attention_backend_compatibility", ("self",)),
    Target(f"{_ARGUMENTS}.ServerArgs.get_model_config", ("self",)),
)


def keep_request(cls: type) -> type:
    """Let instances of ``cls`` keep what the user gave, for `requested`."""
    resolve = cls.__post_init__

    def __post_init__(self):
        self._spark_requested = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        resolve(self)

    cls.__post_init__ = __post_init__
    return cls


def wrap_steps(cls: type, steps: Mapping[str, Callable[[Any, Callable], None]]) -> None:
    """Let ``wrapper(server_args, previous)`` run in the place of each named step of the resolution."""
    for step, wrapper in steps.items():
        method = f"_{step}"
        setattr(cls, method, wrapped(getattr(cls, method), wrapper))


def wrapped(previous: Callable, wrapper: Callable[[Any, Callable], None]) -> Callable:
    """A step that calls ``wrapper(server_args, previous)``."""

    @functools.wraps(previous)
    def step(server_args):
        wrapper(server_args, previous)

    return step


def add_backend_choice(name: str) -> None:
    """Accept ``name`` for ``--attention-backend``."""
    from sglang.srt.server_args import add_attention_backend_choices

    add_attention_backend_choices([name])


def resolve(server_args: Any) -> None:
    """Nothing is left to do: arguments resolve when they are made."""


def requested(server_args: Any) -> dict[str, Any]:
    """Arguments as the user gave them, by field name."""
    return server_args._spark_requested


def resolved(server_args: Any) -> Any:
    """Arguments as SGLang has resolved them so far: the fields themselves."""
    return server_args


def model_config(server_args: Any) -> Any:
    """SGLang's ``ModelConfig`` of the model that is to be served."""
    return server_args.get_model_config()


def declare(server_args: Any, **fields: Any) -> None:
    """Decide fields, for the steps that follow and for the server."""
    for name, value in fields.items():
        setattr(server_args, name, value)
