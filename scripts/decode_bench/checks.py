"""Results against the definition in ``spark_kernels.reference``, before anything is timed.

The reference runs on the CPU. Under Triton's interpreter (``TRITON_INTERPRET=1``) the same checks run the Triton
kernels on CPU tensors; float16 then takes the place of bfloat16, whose matrices the interpreter multiplies wrongly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import accumulate

import torch

import spark_kernels as sk
from decode_bench.methods import DENSE_METHODS, Batch, Spark
from decode_bench.settings import Heads, Setting
from decode_bench.timing import capture
from spark_kernels import reference

# Root mean square of the error, of that of the result; weights and results are rounded to bfloat16.
TOLERANCE = 1e-2
LSE_TOLERANCE = 1e-2
GPU_LENGTHS = (33, 1, 700, 4100, 9000)
INTERPRETED_LENGTHS = (9, 1, 150)
# New tokens of each request in extend.
_CHUNK = 5


class WrongResult(RuntimeError):
    """A kernel's result is not what the reference says; the message names kernel, setting and error."""


def check_all(
    heads: Heads, settings: list[Setting], device: torch.device, lengths: tuple[int, ...], log: Callable[[str], None]
) -> dict[str, str]:
    """Check rows of every setting, and the dense kernels that are there.

    Parameters
    ----------
    lengths
        Tokens of the requests of the batch that is checked.
    log
        Called with a line about each thing that is right, or not there.

    Returns
    -------
    The dense kernels that are not there, by name, and why.

    Raises
    ------
    WrongResult
        At the first result that is wrong.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    for setting in settings:
        if dtype == torch.float16:
            values = setting.value_dtype.replace("bfloat16", "float16")
            setting = dataclasses.replace(setting, value_dtype=values, number_dtype=dtype)
        check_rows(Batch(list(lengths), heads, device, dtype), setting)
        log(f"{setting}: write, decode and extend equal the reference")
    missing = {}
    for name, (_, cache_dtype) in DENSE_METHODS.items():
        if dtype == torch.float16 and cache_dtype == torch.bfloat16:
            cache_dtype = dtype
        try:
            check_dense(name, Batch(list(lengths), heads, device, dtype), cache_dtype)
        except WrongResult:
            raise
        # Somebody else's kernel that does not import, build or run here leaves a column empty.
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            log(f"{name}: not there: {missing[name]}")
        else:
            log(f"{name}: decode equals the reference")
    return missing


def check_rows(batch: Batch, setting: Setting) -> None:
    """Write the tokens of ``batch`` and attend to them."""
    heads, tokens = batch.heads, batch.num_slots - 1
    q, k, v = (batch.random(tokens, n) for n in (heads.num_qo_heads, heads.num_kv_heads, heads.num_kv_heads))
    rows = setting.rows(batch.num_slots, heads, batch.device)
    expected = setting.rows(batch.num_slots, heads, "cpu")
    for part, indptr in _writes(batch):
        slots = batch.kv_indices[part]
        writer = sk.SparkBatchWriteWrapper(batch.device)
        writer.plan(slots, indptr)
        writer.run(q[part], k[part], v[part], rows)
        on_cpu = (x[part].cpu() for x in (q, k, v))
        reference.write_rows(*on_cpu, slots.cpu().long(), expected, qo_indptr=None if indptr is None else indptr.cpu())
    _same_bytes(f"write, {setting}, keys", rows.keys, expected.keys)
    _same_bytes(f"write, {setting}, values", rows.values, expected.values)
    _check_decode(batch, setting, rows, expected)
    _check_extend(batch, setting, rows, expected)


def _writes(batch: Batch) -> list[tuple[slice, torch.Tensor | None]]:
    """Tokens to write at once, with the chunks of a prefill: of the first request by themselves, as decode does."""
    first = batch.lengths[0]
    bounds = [0, *accumulate(batch.lengths[1:])]
    chunks = torch.tensor(bounds, dtype=torch.int32, device=batch.device)
    return [(slice(0, first), None), (slice(first, batch.num_slots - 1), chunks)]


def _check_decode(batch: Batch, setting: Setting, rows: sk.LayerRows, expected: sk.LayerRows) -> None:
    sm_scale = batch.heads.sm_scale
    heads = dataclasses.astuple(batch.heads)
    eager = sk.SparkBatchDecodeWrapper(batch.device)
    eager.plan(batch.kv_indptr, batch.kv_indices, *heads)
    out, lse = eager.run(batch.q, rows, sm_scale=sm_scale, return_lse=True)
    right, right_lse = _expected_decode(batch, expected, batch.kv_indptr)
    _close(f"decode, {setting}", out, right, TOLERANCE)
    _near(f"decode, {setting}, lse", lse, right_lse)

    # Captured for one token each, then planned again for the batch, as a server does.
    ones = torch.arange(len(batch.lengths) + 1, dtype=torch.int32, device=batch.device)
    short = copy_of(batch, kv_indptr=ones, kv_indices=batch.kv_indices.clone())
    method = Spark(short, setting, rows=rows)
    results: dict[str, torch.Tensor] = {}

    def step() -> None:
        results["out"] = method.run(0)

    if batch.device.type == "cuda":
        graph = capture(step)
        replay = graph.replay
    else:
        replay = step
    for indptr in (ones.clone(), batch.kv_indptr):
        method.wrapper.plan(indptr, batch.kv_indices, *heads)
        replay()
        right, _ = _expected_decode(batch, expected, indptr)
        _close(f"captured decode, {setting}, {int(indptr[-1])} tokens", results["out"], right, TOLERANCE)


def copy_of(batch: Batch, **changes: torch.Tensor) -> Batch:
    """The same batch with other tensors."""
    changed = Batch.__new__(Batch)
    changed.__dict__.update(batch.__dict__, **changes)
    return changed


def _expected_decode(batch: Batch, rows: sk.LayerRows, kv_indptr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, slots = batch.q.cpu(), batch.kv_indices.cpu().long()
    return reference.decode_attention(q, rows, kv_indptr.cpu(), slots, sm_scale=batch.heads.sm_scale)


def _check_extend(batch: Batch, setting: Setting, rows: sk.LayerRows, expected: sk.LayerRows) -> None:
    heads, size = batch.heads, len(batch.lengths)
    q, k, v = (batch.random(_CHUNK * size, n) for n in (heads.num_qo_heads, heads.num_kv_heads, heads.num_kv_heads))
    chunks = torch.arange(0, _CHUNK * size + 1, _CHUNK, dtype=torch.int32)
    # Segments that cut through requests.
    wrapper = sk.SparkBatchPrefillWrapper(batch.device, segment_tokens=1 + sum(batch.lengths) * 2 // 5)
    wrapper.plan(chunks, batch.kv_indptr, batch.kv_indices, *dataclasses.astuple(heads))
    out = wrapper.run(q, k, v, rows, sm_scale=heads.sm_scale)
    on_cpu = (x.cpu() for x in (q, k, v))
    right, _ = reference.extend_attention(
        *on_cpu, expected, chunks, batch.kv_indptr.cpu(), batch.kv_indices.cpu().long(), sm_scale=heads.sm_scale
    )
    _close(f"extend, {setting}", out, right, TOLERANCE)


def check_dense(name: str, batch: Batch, cache_dtype: torch.dtype) -> None:
    """A dense kernel against dense attention of the same numbers."""
    make, _ = DENSE_METHODS[name]
    k, v = (batch.random(batch.num_slots, batch.heads.num_kv_heads).to(cache_dtype) for _ in range(2))
    out = make(batch, cache_dtype, cache=(k, v)).run(0)
    start = 0
    for request, length in enumerate(batch.lengths):
        slots = batch.kv_indices[start : start + length].long().cpu()
        q = batch.q[request : request + 1].float().cpu()
        right, _ = reference.dense_attention(
            q, k.cpu()[slots].float(), v.cpu()[slots].float(), sm_scale=batch.heads.sm_scale
        )
        _close(f"{name}, request of {length} tokens", out[request : request + 1], right, TOLERANCE)
        start += length


def _close(what: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    actual, expected = actual.double().cpu(), expected.double().cpu()
    error = float((actual - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise WrongResult(f"{what}: the root mean square error is {error:.2e} of the result, at most {tolerance:.0e}")


def _near(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((actual.cpu() - expected).abs().max())
    if not error <= LSE_TOLERANCE:
        raise WrongResult(f"{what}: the largest error is {error:.2e}, at most {LSE_TOLERANCE:.0e}")


def _same_bytes(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Slot 0 is nobody's.
    wrong = (actual.cpu() != expected)[1:].flatten(1).any(1)
    if wrong.any():
        raise WrongResult(f"{what}: {int(wrong.sum())} of {len(wrong)} tokens' rows differ from the reference")
