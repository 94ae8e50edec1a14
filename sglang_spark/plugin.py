"""What SGLang calls at start-up in every process."""

from __future__ import annotations

from importlib.metadata import version

from sglang_spark.targets import CALLED, check_release, warn_of_release


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``.

    Without ``--kv-compress spark`` every hook passes through to what it wraps. SGLang only logs an exception raised
    here and goes on: the flag then does not exist, and the pool and the backend call `check_installed` besides.

    Raises
    ------
    UnsupportedSGLangError
        This release was not run before and lacks a target.
    """
    release = version("sglang")
    # Before the import of what imports these.
    check_release(release, CALLED)
    from sglang.srt.arg_groups.choices import add_attention_backend_choices
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.plugins.hook_registry import HookRegistry

    from sglang_spark.conditions import BACKEND
    from sglang_spark.hooks import HOOKS, RESOLUTION_HOOKS
    from sglang_spark.server_args import teach_engine

    check_release(release, [hook.target for hook in HOOKS])
    warn_of_release(release)
    add_attention_backend_choices([BACKEND])
    register_attention_backend(BACKEND)(build_backend)
    for hook in HOOKS:
        HookRegistry.register(hook.target.path, hook.replacement, hook.type)
    for step, wrapper in RESOLUTION_HOOKS.items():
        register_resolution_hook(step)(wrapper)
    teach_engine()


def build_backend(model_runner):
    """Factory that SGLang calls for ``attention_backend="spark"``."""
    from sglang_spark import canary
    from sglang_spark.attention.backend import SparkAttnBackend
    from sglang_spark.attention.warm_up import warm_up
    from sglang_spark.attention.windows import WindowedSparkAttnBackend

    check_installed()
    backend_class = WindowedSparkAttnBackend if model_runner.model_config.is_hybrid_swa else SparkAttnBackend
    backend = (canary.watched(backend_class) if canary.is_on() else backend_class)(model_runner)
    warm_up(backend, model_runner.model, model_runner.dtype)
    return backend


def check_installed() -> None:
    """Stop a process in which SGLang did not apply every hook.

    Raises
    ------
    RuntimeError
        Names the targets. SGLang's registry logs a hook that it could not apply and continues, which would serve
        something other than what was asked for.
    """
    from sglang_spark.hooks import HOOKS

    missing = [hook.target.path for hook in HOOKS if not hook.is_applied()]
    if missing:
        raise RuntimeError(
            "--kv-compress spark was asked for, but these SGLang functions are not hooked in this process: "
            + ", ".join(missing)
            + ". Is this SGLang version supported, and is SGLANG_PLUGINS unset or does it contain 'spark'?"
        )
