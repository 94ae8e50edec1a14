"""Decode over rows against dense kernels, on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from decode_bench.methods import DENSE_METHODS, Batch, Copy, Spark
from decode_bench.settings import Heads, Setting, Shape, copies_that_fit
from decode_bench.timing import capture, median_ms

DOES_NOT_FIT = "does not fit the memory"


class Method(Protocol):
    """One of `decode_bench.methods`."""

    def run(self, copy: int) -> torch.Tensor: ...


def measure(
    shapes: list[Shape],
    heads: Heads,
    settings: list[Setting],
    device: torch.device,
    missing: dict[str, str],
    seconds: float,
    deadline: float,
    log: Callable[[str], None],
) -> list[dict]:
    """A row per shape and setting, milliseconds per layer of a step through copies of the layer in turn.

    Parameters
    ----------
    missing
        Dense kernels that are not there, and why.
    seconds
        To spend on each timing.
    deadline
        Of `time.monotonic`; shapes whose turn comes later are left out.
    """
    rows = []
    for shape in shapes:
        if time.monotonic() > deadline:
            log(f"{shape}: left out, the time is up")
            continue
        log(f"{shape}")
        batch = Batch([shape.seq_len] * shape.batch, heads, device, torch.bfloat16)
        dense = {name: _dense_ms(name, batch, shape, seconds) for name in DENSE_METHODS if name not in missing}
        reasons = missing | {name: DOES_NOT_FIT for name, ms in dense.items() if ms is None}
        dense |= dict.fromkeys(missing)
        for setting in settings:
            times = _spark_times(batch, shape, setting, seconds)
            if times is None:
                log(f"{shape}, {setting}: left out, it {DOES_NOT_FIT}")
            else:
                rows.append(row(shape, setting, times, dense, reasons))
    return rows


def row(
    shape: Shape,
    setting: Setting,
    times: dict[str, float],
    dense: dict[str, float | None],
    missing: dict[str, str],
) -> dict:
    """A row of the results; ``dense_ms`` is FlashInfer's in bfloat16, or else SGLang's Triton kernel's."""
    dense_kernel = next((name for name in ("flashinfer_bf16", "triton") if dense[name] is not None), None)
    dense_ms = dense[dense_kernel] if dense_kernel else None
    return {
        "seq_len": shape.seq_len,
        "batch": shape.batch,
        "spark_ms": times["spark_ms"],
        "dense_ms": dense_ms,
        "ratio": dense_ms / times["spark_ms"] if dense_ms else None,
        "dense_kernel": dense_kernel,
        "setting": str(setting),
        "spark_eager_ms": times["spark_eager_ms"],
        "copy_ms": times["copy_ms"],
        "roofline": times["copy_ms"] / times["spark_ms"],
        **{f"{name}_ms": ms for name, ms in dense.items()},
        "missing": missing,
    }


def _dense_ms(name: str, batch: Batch, shape: Shape, seconds: float) -> float | None:
    """None if it does not fit."""
    make, dtype = DENSE_METHODS[name]
    copies = _copies(shape, 2 * batch.heads.num_kv_heads * batch.heads.head_dim * dtype.itemsize, batch.device)
    try:
        return _captured_ms(make(batch, dtype, copies), copies, seconds) if copies else None
    except torch.OutOfMemoryError:
        return None


def _spark_times(batch: Batch, shape: Shape, setting: Setting, seconds: float) -> dict[str, float] | None:
    """Captured, eager, and of a copy that moves as many bytes; None if they do not fit."""
    token_bytes = setting.bytes_per_token(batch.heads)
    copies = _copies(shape, token_bytes, batch.device)
    if not copies:
        return None
    try:
        times = _captured_and_eager_ms(Spark(batch, setting, copies), copies, seconds)
        torch.cuda.empty_cache()
        copied = Copy(shape.tokens * token_bytes, copies, batch.device)
        return times | {"copy_ms": _captured_ms(copied, copies, seconds)}
    except torch.OutOfMemoryError:
        return None


def _captured_and_eager_ms(method: Spark, copies: int, seconds: float) -> dict[str, float]:
    return {
        "spark_ms": _captured_ms(method, copies, seconds),
        "spark_eager_ms": median_ms(lambda: _all_layers(method, copies), seconds) / copies,
    }


def _copies(shape: Shape, token_bytes: int, device: torch.device) -> int:
    torch.cuda.empty_cache()
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return copies_that_fit(shape, token_bytes, l2_bytes, torch.cuda.mem_get_info(device)[0])


def _captured_ms(method: Method, copies: int, seconds: float) -> float:
    graph = capture(lambda: _all_layers(method, copies))
    return median_ms(graph.replay, seconds) / copies


def _all_layers(method: Method, copies: int) -> None:
    for copy in range(copies):
        method.run(copy)
