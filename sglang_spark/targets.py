"""Whether what SparK hooks into is there, and takes the arguments that its hooks take."""

from __future__ import annotations

import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookType

if TYPE_CHECKING:
    from sglang_spark.plugin import Hook


def current(hook: Hook) -> Any:
    """What SGLang calls at the hook's target at present, wrapped or not.

    Raises
    ------
    ImportError, AttributeError
        There is no such target in this SGLang.
    """
    owner, attribute = hook.target.rsplit(".", 1)
    return getattr(pkgutil.resolve_name(owner), attribute)


def is_applied(hook: Hook) -> bool:
    """Whether SGLang's registry has put the hook in place in this process."""
    if hook.type is HookType.REPLACE:
        return current(hook) is hook.replacement
    return hasattr(current(hook), "__wrapped__")


def problem(hook: Hook) -> str | None:
    """Why the hook cannot work with the installed SGLang, or None where it can.

    The parameters that the replacement names must exist, and it must accept all others.
    """
    try:
        target = current(hook)
    except (ImportError, AttributeError) as error:
        return f"{hook.target} does not exist ({error})"
    if hook.type is HookType.REPLACE:
        return None
    # The first parameter is self; a replacement has the original function, or its result, before that.
    theirs = list(inspect.signature(target).parameters.values())[1:]
    ours = list(inspect.signature(hook.replacement).parameters.values())[2:]
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in ours)
    named = [parameter for parameter in ours if parameter.kind not in _VARIADIC]
    names = {parameter.name for parameter in theirs}
    missing = [parameter.name for parameter in named if parameter.name not in names]
    if missing:
        return f"{hook.target} has no parameter {', '.join(missing)}"
    unknown = names - {parameter.name for parameter in named}
    if unknown and not open_ended:
        return f"{hook.target} has parameters SparK does not know: {', '.join(sorted(unknown))}"
    return None


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
