"""Something of SGLang that has moved or changed its parameters is told apart from what SparK expects."""

from __future__ import annotations

import inspect

import pytest

from sglang_spark.hooks import HOOKS
from sglang_spark.targets import CALLED, Target

ROWS = 7


class Pool:
    def __init__(self, size, *, page_size): ...

    def move(self, target, source, *rest, **kwargs): ...


AS_EXPECTED = [
    Target(f"{__name__}.ROWS"),
    Target(f"{__name__}.Pool", ("size", "page_size")),
    Target(f"{__name__}.Pool.move", ("self", "target", "source", "*rest", "**kwargs")),
    Target(f"{__name__}.Pool.move", ("self", "target", ...)),
    Target(f"{__name__}.Pool.move", ("self", "target", "source", "*rest", "**kwargs", ...)),
]


@pytest.mark.parametrize("target", AS_EXPECTED, ids=str)
def test_a_target_as_expected_has_no_problem(target):
    assert target.problem() is None


@pytest.mark.parametrize(
    "path", [f"{__name__}.Pool.copy", f"{__name__}.OtherPool.move", f"{__name__}.pages.Pool", "no_such_package.x"]
)
def test_a_target_that_is_not_there_is_named(path):
    assert Target(path).problem().startswith(f"{path} is missing (")


@pytest.mark.parametrize(
    ("expected", "shown"),
    [
        (("self", "target", "source"), "self, target, source"),
        (("self", "source", "target", "*rest", "**kwargs"), "self, source, target, *rest, **kwargs"),
        (("self", "target", "source", "rest", "kwargs"), "self, target, source, rest, kwargs"),
        (("self", "source", ...), "self, source, ..."),
    ],
    ids=["fewer", "other-order", "no-stars", "begins-otherwise"],
)
def test_another_signature_is_shown_with_the_expected_one(expected, shown):
    problem = Target(f"{__name__}.Pool.move", expected).problem()
    assert problem == f"{__name__}.Pool.move takes (self, target, source, *rest, **kwargs) instead of ({shown})"


@pytest.mark.parametrize("target", [*CALLED, *(hook.target for hook in HOOKS)], ids=lambda target: target.path)
def test_the_installed_release_has_every_target(target):
    # Inspected as SGLang has it: a hook's own wrapper keeps the signature of what it wraps.
    assert target.problem() is None


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target.path.rpartition(".")[2])
def test_a_replacement_accepts_what_sglang_passes_to_its_target(hook):
    parameters = inspect.signature(hook.target.current()).parameters.values()
    by_position = [None for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    by_name = {parameter.name: None for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    # A class method's class is bound in the target and passed to what replaces it.
    if inspect.ismethod(hook.target.current()):
        by_position.append(None)
    # What the target was, or what it has returned, comes first.
    inspect.signature(hook.replacement).bind(None, *by_position, **by_name)
