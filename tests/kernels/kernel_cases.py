"""Layers full of tokens, and how close results must be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch

from spark_kernels import Integers, KeyCalibration, LayerRows, Numbers, Pruned, reference
from spark_kernels.formats import KeyFormat, ValueFormat

NUMBERS = ("bfloat16", "float16", "float32")
# Pruned keys by the average width of their restoration; "all widths" has channels of 4, 2, 1 and 0 bits.
PRUNED = ("4 bits", "3 bits", "2 bits", "0 bits", "all widths")
KEYS = PRUNED + NUMBERS
VALUES = (*NUMBERS, "float8_e4m3fn", "int4", "int3")
RAGGED_LENGTHS = (0, 1, 700, 0, 33, 256, 257, 5)


def key_format(keys: str, head_dim: int, key_ratio: float = 0.95) -> KeyFormat:
    """The format called ``keys`` in test ids."""
    if keys in NUMBERS:
        return Numbers(head_dim, getattr(torch, keys))
    if keys == "2 bits":
        return Pruned(head_dim, (0, head_dim, 0, 0), kept_channels=4)
    if keys == "all widths":
        one, none = 16 * (head_dim // 64), 8 * (head_dim // 64)
        four = 8 * (head_dim // 32)
        return Pruned(head_dim, (four, head_dim - four - one - none, one, none), kept_channels=5)
    return Pruned.from_ratio(head_dim, key_ratio, int(keys[0]))


def value_format(values: str, head_dim: int) -> ValueFormat:
    """The format called ``values`` in test ids."""
    if values.startswith("int"):
        return Integers(head_dim, int(values[3:]))
    return Numbers(head_dim, getattr(torch, values))


def random_calibration(num_kv_heads: int, head_dim: int) -> KeyCalibration:
    """Centres up to some deviations from 0, and deviations that differ by an order of magnitude."""
    shape = (num_kv_heads, head_dim)
    return KeyCalibration.from_statistics(3 * torch.randn(shape), torch.rand(shape) * 2 + 0.1, torch.rand(shape) + 0.1)


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
        keys: str = "3 bits",
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
        made = key_format(keys, head_dim)
        calibration = random_calibration(num_kv_heads, head_dim) if isinstance(made, Pruned) else None
        if calibration:
            k = (k * calibration.step + calibration.centre).to(dtype)
        rows = LayerRows.allocate(tokens + 7, num_kv_heads, made, value_format(values, v_head_dim), calibration)
        slots = torch.randperm(rows.num_slots)[:tokens]
        indptr = torch.tensor([0, *accumulate(lengths)])
        reference.write_rows(q, k, v, slots, rows, qo_indptr=indptr, v_scale=v_scale)
        return cls(q, k, v, slots, indptr, rows)

    def empty_rows(self) -> LayerRows:
        """Zeroed rows like the layer's."""
        rows = self.rows
        formats = rows.key_format, rows.value_format
        return LayerRows.allocate(rows.num_slots, rows.num_kv_heads, *formats, rows.calibration, rows.device)

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
