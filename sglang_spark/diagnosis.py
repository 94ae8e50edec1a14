"""Whether SparK would serve here, and what it would store: the questions that ``sglang_spark.doctor`` answers.

Nothing here repeats a fact: version ranges come from the package's metadata, hooks from `plugin`, refusals from
`compatibility` and sizes from `layout`, by the same calls that a starting server makes.
"""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from types import SimpleNamespace
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

DISTRIBUTION = "sglang-spark"
GIB = 1 << 30
# Names of checks of hooks begin with it.
HOOK = "hook "


@dataclass(frozen=True)
class Check:
    """One property of the environment: what was looked at, whether it will do, and what was found."""

    name: str
    ok: bool
    detail: str


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
        SparK's formats in words.
    """

    bytes_per_token: dict[str, int]
    tokens: dict[str, int] | None
    summary: dict[str, int]


def check_environment() -> list[Check]:
    """Python, packages, the plugin, every hook and the device, in the order in which they depend on each other."""
    checks = [*_packages()]
    if all(check.ok for check in checks):
        checks += [_plugin(), *_hooks(), _device()]
    return checks


def examine_model(model_path: str, flags: list[str], memory_gib: float | None) -> Fit:
    """Resolve the arguments of a server with ``--kv-compress spark`` as that server would, and size its cache.

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
    from sglang.srt.server_args import prepare_server_args

    from sglang_spark import adapters
    from sglang_spark.adapters.model_share import ModelShare
    from sglang_spark.layout import PoolLayout

    arguments = prepare_server_args(["--model-path", model_path, *flags, "--kv-compress", "spark"])
    adapters.arguments.resolve(arguments)
    adapters.settings.publish(arguments)
    model_config = adapters.arguments.model_config(arguments)
    resolved = adapters.arguments.resolved(arguments)
    share = ModelShare(model_config, range(model_config.num_hidden_layers), model_config.dtype)
    # There are no processes that could be asked.
    attention_tp_size = resolved.tp_size // (resolved.dp_size if resolved.enable_dp_attention else 1)
    layout = PoolLayout.of(share, resolved.kv_cache_dtype, attention_tp_size)
    bytes_per_token = {
        "dense": layout.dense_bytes_per_token,
        "dense_fp8": layout.dense_bytes_per_token // layout.model_dtype.itemsize,
        "spark": layout.bytes_per_token,
    }
    tokens = None
    if memory_gib is not None:
        page_size = resolved.page_size
        memory = int(memory_gib * GIB)
        tokens = {cache: memory // size // page_size * page_size for cache, size in bytes_per_token.items()}
    return Fit(bytes_per_token, tokens, layout.sizes())


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
    from sglang_spark import plugin

    loaded = all(hook.target.path in HookRegistry._hooks for hook in plugin.HOOKS)
    only = os.environ.get("SGLANG_PLUGINS")
    detail = "loaded by SGLang" if loaded else "not loaded by SGLang" + (f": SGLANG_PLUGINS={only}" if only else "")
    return Check("plugin", loaded, detail)


def _hooks() -> list[Check]:
    from sglang_spark import plugin

    checks = []
    for hook in plugin.HOOKS:
        problem = hook.target.problem()
        if problem is None and not hook.is_applied():
            problem = f"{hook.target.path} is not hooked in this process"
        checks.append(
            Check(f"{HOOK}{hook.target.path.removeprefix('sglang.srt.')}", problem is None, problem or hook.reason)
        )
    return checks


def _device() -> Check:
    from sglang.srt.utils.common import get_device

    from sglang_spark import compatibility

    try:
        device = get_device()
    except RuntimeError:
        device = "cpu"
    launch = compatibility.Launch(requested={}, resolved=SimpleNamespace(device=device), model_config=None)
    refused = [row.message(value) for row in _rows("--device") if (value := row.offending(launch)) is not None]
    return Check("device", not refused, refused[0] if refused else _name_of(device))


def _rows(setting: str) -> list[Any]:
    from sglang_spark import compatibility

    return [row for row in compatibility.REFUSALS if row.setting == setting]


def _name_of(device: str) -> str:
    import torch

    if device == "cpu":
        return "cpu: no accelerator found"
    return f"{device}: {torch.get_device_module(device).get_device_name()}"
