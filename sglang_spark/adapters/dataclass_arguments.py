"""SGLang 0.5.14 to 0.5.18: the arguments are a dataclass, its flags follow from the annotations of its fields."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, get_type_hints

from sglang.srt.arg_groups import arg_utils

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

# In 0.5.18 a field names the namespace it is read from; 0.5.16 has no namespaces.
HAS_NAMESPACES = hasattr(arg_utils, "NS")
# Of the class that adds fields to SGLang's.
CLASS_KEYWORDS: dict[str, Any] = {}

TARGETS = (
    *dataclass_resolution.TARGETS,
    Target("sglang.srt.arg_groups.arg_utils.A"),
    Target("sglang.srt.arg_groups.arg_utils.Arg"),
)


def annotation() -> tuple[Any, Any]:
    """What a field of the arguments is annotated with, ``A[type, Arg(help=...)]``: ``A`` and ``Arg``."""
    return arg_utils.A, arg_utils.Arg


def as_dataclass(cls: type) -> type:
    """Decorates a class that adds fields to the dataclass of arguments."""
    own = get_type_hints(cls, include_extras=True)
    for name in cls.__annotations__:
        if HAS_NAMESPACES:
            cls.__annotations__[name] = Annotated[own[name], arg_utils.NS(cls._NS_PATH)]
    return dataclasses.dataclass(cls)


def complete(cls: type) -> type:
    """Decorates the class that adds fields: makes it a dataclass and keeps what the user gave."""
    return as_dataclass(keep_request(cls))


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
