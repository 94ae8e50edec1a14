"""What ``--kv-compress spark`` needs of the machine and of the installed packages, each found or not."""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from types import SimpleNamespace

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from sglang_spark.targets import CALLED, UnsupportedSGLangError, check_release

DISTRIBUTION = "sglang-spark"
# Names of checks of hooks begin with it.
HOOK = "hook "


@dataclass(frozen=True)
class Check:
    """One property of the environment: what was looked at, whether it will do, and what was found."""

    name: str
    ok: bool
    detail: str


def check_environment() -> list[Check]:
    """Python, packages, the plugin, every hook and the device, in the order in which they depend on each other."""
    checks = [*_packages()]
    if all(check.ok for check in checks):
        checks.append(_plugin())
    if all(check.ok for check in checks):
        checks += [*_hooks(), _device()]
    return checks


def _packages() -> list[Check]:
    try:
        wanted = [Requirement(text) for text in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        return [Check(DISTRIBUTION, False, "not installed, so SGLang does not find its plugin; pip install it")]
    python = platform.python_version()
    python_range = metadata(DISTRIBUTION)["Requires-Python"]
    checks = [
        Check("python", SpecifierSet(python_range).contains(python), f"{python}, needs {python_range}"),
        Check(DISTRIBUTION, True, version(DISTRIBUTION)),
    ]
    return checks + [_package(requirement) for requirement in wanted if requirement.marker is None]


def _package(requirement: Requirement) -> Check:
    needs = f", needs {requirement.specifier}" if requirement.specifier else ""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(requirement.name, False, f"not installed{needs}")
    try:
        importlib.import_module(requirement.name)
    except Exception as error:  # a package that is installed and broken raises anything
        return Check(requirement.name, False, f"{found} does not import: {error}")
    return Check(requirement.name, requirement.specifier.contains(found, prereleases=True), f"{found}{needs}")


def _plugin() -> Check:
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    load_plugins()
    try:
        check_release(version("sglang"), CALLED)
    except UnsupportedSGLangError as error:
        return Check("plugin", False, str(error))
    from sglang_spark.hooks import HOOKS

    loaded = all(hook.target.path in HookRegistry._hooks for hook in HOOKS)
    only = os.environ.get("SGLANG_PLUGINS")
    detail = "loaded by SGLang" if loaded else "not loaded by SGLang" + (f": SGLANG_PLUGINS={only}" if only else "")
    return Check("plugin", loaded, detail)


def _hooks() -> list[Check]:
    from sglang_spark.hooks import HOOKS

    checks = []
    for hook in HOOKS:
        problem = hook.target.problem()
        if problem is None and not hook.is_applied():
            problem = f"{hook.target.path} is not hooked in this process"
        checks.append(
            Check(f"{HOOK}{hook.target.path.removeprefix('sglang.srt.')}", problem is None, problem or hook.reason)
        )
    return checks


def _device() -> Check:
    import torch
    from sglang.srt.utils.common import get_device

    from sglang_spark.conditions import Launch
    from sglang_spark.refusals import DEVICE_REFUSALS

    try:
        device = get_device()
    except RuntimeError:
        device = "cpu"
    launch = Launch(record=None, requested={}, resolved=SimpleNamespace(device=device), model_config=None)
    refused = [row.message(value) for row in DEVICE_REFUSALS if (value := row.offending(launch)) is not None]
    if refused:
        return Check("device", False, refused[0])
    found = "no accelerator found" if device == "cpu" else torch.get_device_module(device).get_device_name()
    return Check("device", True, f"{device}: {found}")
