"""After the warm-up nothing is compiled: not by decode, a first prefix hit, long contexts or other batch sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from row_pools import make_pool, pruned
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_spark.attention import indices
from sglang_spark.attention.warm_up import warm_up
from spark_kernels import (
    Integers,
    Numbers,
    SparkBatchDecodeWrapper,
    SparkBatchPrefillWrapper,
    SparkBatchWriteWrapper,
)

SHAPE = NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 64
NUM_SLOTS = 40_000
DTYPE = torch.bfloat16
FORMATS = (pruned(HEAD_DIM), Numbers(HEAD_DIM, DTYPE))


def _backend() -> tuple[SimpleNamespace, torch.nn.Module]:
    """What `warm_up` needs of one, and a model of a pruned layer, one with a soft cap and one of whole keys."""
    key_formats = (FORMATS[0], FORMATS[0], FORMATS[1])
    pool = make_pool(NUM_SLOTS, key_formats, Integers(HEAD_DIM, 4), num_kv_heads=NUM_KV_HEADS)
    layers = [
        RadixAttention(NUM_QO_HEADS, HEAD_DIM, 0.1, NUM_KV_HEADS, layer_id=number, logit_cap=cap)
        for number, cap in enumerate((0.0, 30.0, 0.0))
    ]
    return SimpleNamespace(pool=pool, shape=SHAPE, device=torch.device("cpu")), torch.nn.ModuleList(layers)


def _serve(pool) -> None:
    """Batches of several sizes, with and without prefixes, short and longer than a split and a segment."""
    for layer in range(3):
        rows, cap = pool.layer_rows(layer), 30.0 if layer == 1 else 0.0
        for chunks, prefixes in (([7], [0]), ([5, 1, 64], [0, 300, 3]), ([3] * 17, [20] * 17), ([2], [33_000])):
            indptr = [indices.indptr(torch.tensor(lengths)) for lengths in (chunks, prefixes)]
            tokens = sum(chunks)
            q, k, v = (torch.randn(tokens, heads, HEAD_DIM).to(DTYPE) for heads in (4, 2, 2))
            slots = torch.arange(1, 1 + sum(prefixes) + tokens)
            prefill, writer = SparkBatchPrefillWrapper("cpu"), SparkBatchWriteWrapper("cpu")
            prefill.plan(*indptr, slots[: sum(prefixes)].int(), *SHAPE)
            prefill.run(q, k, v, rows, sm_scale=0.1, logits_soft_cap=cap)
            writer.plan(slots[-tokens:], indptr[0])
            writer.run(q, k, v, rows)
            lengths = torch.tensor([one + other for one, other in zip(chunks, prefixes, strict=True)])
            batch = len(chunks)
            writer.plan(slots[:batch])
            writer.run(q[:batch], k[:batch], v[:batch], rows)
            decode = SparkBatchDecodeWrapper("cpu")
            decode.plan(indices.indptr(lengths), slots.int(), *SHAPE)
            decode.run(q[:batch], rows, sm_scale=0.1, logits_soft_cap=cap)


def _compiled() -> dict[str, int]:
    """By numba's functions: how many types of arguments they have been compiled or loaded for."""
    functions = {
        f"{name}.{attribute}": function
        for name, module in sys.modules.items()
        if name.startswith("spark_kernels.cpu.")
        for attribute, function in vars(module).items()
        if hasattr(function, "signatures")
    }
    return {name: len(function.signatures) for name, function in functions.items()}


def test_numba_compiles_nothing_more():
    """In a process of its own: here other tests have compiled everything."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


def test_triton_compiles_nothing_more(monkeypatch):
    sys.path.append(str(Path(__file__).parents[1] / "kernels" / "gpu"))
    from stub_driver import StubDriver
    from triton.runtime import driver

    from spark_kernels import gpu, wrappers, write

    stub = StubDriver(90)
    monkeypatch.setattr(driver, "_active", stub)
    monkeypatch.setattr("spark_kernels.gpu.rows._converts_float8", lambda device: True)
    for module in (wrappers, write):
        monkeypatch.setattr(module, "implementation", lambda device: gpu)
    backend, model = _backend()
    warm_up(backend, model, DTYPE)
    compiled, launches = len(stub.loaded), len(stub.launches)
    _serve(backend.pool)
    assert len(stub.launches) > launches > 0
    assert stub.loaded[compiled:] == []


if __name__ == "__main__":
    backend, model = _backend()
    warm_up(backend, model, DTYPE)
    before = _compiled()
    _serve(backend.pool)
    after = _compiled()
    new = {name: (before.get(name), count) for name, count in after.items() if before.get(name) != count}
    sys.exit(f"compiled after the warm-up: {new}" if new or not any(before.values()) else 0)
