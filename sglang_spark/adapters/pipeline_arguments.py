"""SGLang 0.5.19: the arguments are a dataclass, and steps of their resolution are functions without a registry."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from sglang_spark.adapters.dataclass_arguments import CLASS_KEYWORDS, HAS_NAMESPACES, annotation, as_dataclass
from sglang_spark.adapters.dataclass_resolution import add_backend_choice, wrapped
from sglang_spark.adapters.record_arguments import (
    RESOLUTION_TARGETS,
    declare,
    model_config,
    requested,
    resolve,
    resolved,
)
from sglang_spark.adapters.targets import Target

_GROUPS = "sglang.srt.arg_groups"
# The pipeline imports each step from its module when it runs.
_MODULES = {
    "handle_missing_default_values": f"{_GROUPS}.serving_hook",
    "handle_attention_backend_compatibility": f"{_GROUPS}.attention_hook",
}

TARGETS = (
    *RESOLUTION_TARGETS,
    Target("sglang.srt.server_args.add_attention_backend_choices"),
    Target("sglang.srt.server_args.ServerArgs.resolve_once", ("self",)),
    *(Target(f"{module}.{step}", ("server_args",)) for step, module in _MODULES.items()),
)

complete = as_dataclass


def wrap_steps(cls: type, steps: Mapping[str, Callable[[Any, Callable], None]]) -> None:
    """Let ``wrapper(server_args, previous)`` run in the place of each named step of the resolution."""
    for step, wrapper in steps.items():
        module = importlib.import_module(_MODULES[step])
        setattr(module, step, wrapped(getattr(module, step), wrapper))


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
