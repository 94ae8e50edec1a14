"""Every kernel that serving can reach is compiled before the server is ready, not inside somebody's request."""

from __future__ import annotations

import logging
import time

import torch
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_spark.attention.backend import SparkAttnBackend, value_scale
from sglang_spark.attention.indices import indptr
from spark_kernels import LayerRows, SparkBatchDecodeWrapper, SparkBatchPrefillWrapper, SparkBatchWriteWrapper

logger = logging.getLogger(__name__)

# The GPU kernels that attend to the prefixes of chunks as long are others than those of a few tokens.
_LONG_CHUNK = 16


def warm_up(backend: SparkAttnBackend, model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Write, attend to and restore two tokens in a scratch cache, once per kind of attention layer.

    Parameters
    ----------
    backend
        Whose pool has its calibration.
    model
        The part of it that this process holds.
    dtype
        Of queries, keys and values.
    """
    started, done = time.monotonic(), set()
    for layer in model.modules():
        if not isinstance(layer, RadixAttention) or backend.pool.place(layer.layer_id) is None:
            continue
        rows = backend.pool.layer_rows(layer.layer_id)
        options = {"logits_soft_cap": layer.logit_cap, "v_scale": value_scale(layer)}
        # What kernels are compiled for: not the numbers but whether they are there.
        kind = (rows.key_format, rows.value_format, layer.logit_cap > 0, value_scale(layer) != 1)
        if kind not in done:
            done.add(kind)
            _run(backend, rows, dtype, sm_scale=layer.scaling, **options)
    if backend.device.type == "cuda":
        torch.cuda.synchronize(backend.device)
    logger.info(f"SparK attention: kernels are ready after {time.monotonic() - started:.1f} s")


def _run(backend: SparkAttnBackend, rows: LayerRows, dtype: torch.dtype, *, v_scale: float, **options: float) -> None:
    """With the dtypes of indices that the backend plans with."""
    num_qo_heads, num_kv_heads, head_dim = backend.shape
    device, v_head_dim = backend.device, rows.value_format.head_dim
    scratch = LayerRows.allocate(4, num_kv_heads, rows.key_format, rows.value_format, rows.calibration, device)
    slots = torch.tensor([1, 2], device=device)
    two = torch.tensor([2], device=device)
    q = torch.ones(_LONG_CHUNK, num_qo_heads, head_dim, dtype=dtype, device=device)
    k = torch.ones(_LONG_CHUNK, num_kv_heads, head_dim, dtype=dtype, device=device)
    v = torch.ones(_LONG_CHUNK, num_kv_heads, v_head_dim, dtype=dtype, device=device)

    writer = SparkBatchWriteWrapper(device)
    for of_requests in (None, indptr(two)):
        writer.plan(slots, of_requests)
        writer.run(q[:2], k[:2], v[:2], scratch, v_scale=v_scale)

    decode = SparkBatchDecodeWrapper(device)
    decode.plan(indptr(two), slots.int(), *backend.shape)
    decode.run(q[:1], scratch, v_scale=v_scale, **options)

    # In two segments, as a long prefix is.
    prefill = SparkBatchPrefillWrapper(device, segment_tokens=1)
    for tokens, prefix in ((_LONG_CHUNK, 0), (_LONG_CHUNK, 2), (1, 2)):
        chunk, bounds = indptr(torch.tensor([tokens])), indptr(torch.tensor([prefix]))
        prefill.plan(chunk, bounds, slots[:prefix].int(), *backend.shape)
        prefill.run(q[:tokens], k[:tokens], v[:tokens], scratch, v_scale=v_scale, **options)
