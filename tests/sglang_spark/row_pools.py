"""Pools of rows, with a calibration of no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_spark.calibration import Calibration
from sglang_spark.layout import PoolLayout
from sglang_spark.pool import SparkTokenToKVPool
from spark_kernels import Numbers, Pruned
from spark_kernels.formats import KeyFormat, ValueFormat


def pruned(head_dim: int) -> Pruned:
    return Pruned.from_ratio(head_dim, 0.9, 3)


def make_pool(
    size: int,
    key_formats: tuple[KeyFormat, ...],
    value_format: ValueFormat | None = None,
    *,
    num_kv_heads: int,
    page_size: int = 1,
    start_layer: int = 0,
    layers: Sequence[int] | None = None,
) -> SparkTokenToKVPool:
    """A pool of zeroed rows; bfloat16 values if not said otherwise."""
    head_dim = key_formats[0].head_dim
    value_format = value_format or Numbers(head_dim, torch.bfloat16)
    pool = SparkTokenToKVPool(
        size,
        layout=PoolLayout(
            layers=tuple(layers or range(start_layer, start_layer + len(key_formats))),
            key_formats=key_formats,
            value_format=value_format,
            num_kv_heads=num_kv_heads,
            model_dtype=torch.bfloat16,
        ),
        page_size=page_size,
        dtype=torch.uint8,
        head_num=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        layer_num=len(key_formats),
        device="cpu",
        enable_memory_saver=False,
        start_layer=start_layer,
        end_layer=start_layer + len(key_formats),
    )
    generator = torch.Generator().manual_seed(0)
    shape = (len(key_formats), num_kv_heads, head_dim)
    centre, deviation, query_rms = torch.rand(3, *shape, generator=generator) + 0.5
    pool.calibration = Calibration(centre, deviation, query_rms, fingerprint="0", source="auto")
    return pool
