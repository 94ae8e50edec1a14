"""Layers full of tokens, and how close results must be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch

from spark_kernels import Int4ValueFormat, LayerRows, RawKeyFormat, ValueFormat, reference
from spark_kernels.formats import KeyFormat

KEYS = ("2-bit", "1-bit", "0-bit", "raw bfloat16", "raw float16", "raw float32")
VALUES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "int4")
RAGGED_LENGTHS = (0, 1, 700, 0, 33, 256, 257, 5)


def key_format(keys: str, head_dim: int, key_ratio: float = 0.8):
    """The format called ``keys`` in test ids."""
    if keys.startswith("raw"):
        return RawKeyFormat(head_dim, getattr(torch, keys.removeprefix("raw ")))
    return KeyFormat.from_ratio(head_dim, key_ratio, int(keys[0]))


def value_format(values: str, head_dim: int):
    """The format called ``values`` in test ids."""
    return Int4ValueFormat(head_dim) if values == "int4" else ValueFormat(head_dim, getattr(torch, values))


@dataclass
class Layer:
    """Dense tokens of several requests and the same tokens as rows, written by the reference."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor
    indptr: torch.Tensor
    rows: LayerRows

    @classmethod
    def random(
        cls,
        keys: str = "2-bit",
        values: str = "bfloat16",
        head_dim: int = 128,
        v_head_dim: int | None = None,
        num_kv_heads: int = 2,
        group: int = 4,
        lengths: tuple[int, ...] = RAGGED_LENGTHS,
        dtype: torch.dtype = torch.float32,
        v_scale: float = 1.0,
    ) -> Layer:
        tokens = sum(lengths)
        v_head_dim = v_head_dim or head_dim
        q = torch.randn(tokens, num_kv_heads * group, head_dim).to(dtype)
        k, v = (torch.randn(tokens, num_kv_heads, d).to(dtype) for d in (head_dim, v_head_dim))
        rows = LayerRows.allocate(
            tokens + 7,
            num_kv_heads,
            key_format(keys, head_dim),
            value_format(values, v_head_dim),
        )
        slots = torch.randperm(rows.num_slots)[:tokens]
        indptr = torch.tensor([0, *accumulate(lengths)])
        reference.write_rows(q, k, v, slots, rows, qo_indptr=indptr, v_scale=v_scale)
        return cls(q, k, v, slots, indptr, rows)

    @property
    def batch(self) -> int:
        return len(self.indptr) - 1

    @property
    def sm_scale(self) -> float:
        return self.q.shape[2] ** -0.5


def make_awkward(v: torch.Tensor) -> None:
    """Change the first 14 tokens of ``v``, ``[num_tokens, heads, head_dim]``: zeros, ties, bad and extreme numbers."""
    v[:5] = v[:5].round()
    v[5], v[6] = 0.0, -0.0
    v[7], v[8] = 2.0, -3.0
    v[9, :, 3], v[9, :, 5] = math.nan, -math.nan
    v[10, :, 7], v[11, :, -1] = math.inf, -math.inf
    v[12], v[13] = torch.finfo(v.dtype).max, torch.finfo(v.dtype).smallest_normal


def assert_close(actual: torch.Tensor, expected: torch.Tensor, ratio: float) -> None:
    """The root mean square of the difference is at most ``ratio`` of that of ``expected``."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).norm()
    size = expected.double().norm()
    assert difference <= ratio * size, f"RMS ratio {difference / size:.2e} above {ratio:.0e}"


def assert_lse_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal where infinite, within ``tolerance`` elsewhere."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=tolerance)
