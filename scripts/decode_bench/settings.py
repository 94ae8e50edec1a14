"""What is timed: heads, formats of rows, and the shapes of batches that fit the memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import spark_kernels as sk
from spark_kernels.formats import KeyFormat, ValueFormat

VALUE_DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "int4", "int3")
# Between two uses of a copy of a layer, this many times the L2 cache is read from others.
L2_TURNOVER = 4
# Of the free memory, for the cache of one way to compute attention; the rest is for what it needs besides.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Heads:
    """Shape of a layer's queries and keys."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.num_qo_heads // self.num_kv_heads

    @property
    def sm_scale(self) -> float:
        return self.head_dim**-0.5

    def __str__(self) -> str:
        return f"{self.num_qo_heads} query, {self.num_kv_heads} KV, head_dim {self.head_dim}"


@dataclass(frozen=True)
class Setting:
    """Formats of keys and values; ``number_dtype`` is that of keys at ratio 0."""

    key_ratio: float = 0.96
    restore_bits: float = 3
    value_dtype: str = "int4"
    number_dtype: torch.dtype = torch.bfloat16

    def key_format(self, head_dim: int) -> KeyFormat:
        if self.key_ratio == 0:
            return sk.Numbers(head_dim, self.number_dtype)
        return sk.Pruned.from_ratio(head_dim, self.key_ratio, self.restore_bits)

    def value_format(self, head_dim: int) -> ValueFormat:
        if self.value_dtype.startswith("int"):
            return sk.Integers(head_dim, int(self.value_dtype[3:]))
        return sk.Numbers(head_dim, getattr(torch, self.value_dtype))

    def rows(self, num_slots: int, heads: Heads, device: torch.device | str) -> sk.LayerRows:
        """Zeroed rows of one layer, calibrated for keys of a standard normal distribution."""
        formats = self.key_format(heads.head_dim), self.value_format(heads.head_dim)
        calibration = None
        if isinstance(formats[0], sk.Pruned):
            shape = (heads.num_kv_heads, heads.head_dim)
            statistics = (torch.zeros(shape), torch.ones(shape), torch.ones(shape))
            calibration = sk.KeyCalibration.from_statistics(*statistics).to(device)
        return sk.LayerRows.allocate(num_slots, heads.num_kv_heads, *formats, calibration, device)

    def bytes_per_token(self, heads: Heads) -> int:
        """Of one layer."""
        formats = self.key_format(heads.head_dim), self.value_format(heads.head_dim)
        return heads.num_kv_heads * sum(one.row_bytes for one in formats)

    def __str__(self) -> str:
        keys = "whole keys" if self.key_ratio == 0 else f"ratio {self.key_ratio}, {self.restore_bits:g} bits"
        return f"{keys}, {self.value_dtype} values"


STANDARD_SETTINGS = (Setting(), Setting(restore_bits=2, value_dtype="int3"), Setting(value_dtype="bfloat16"))


@dataclass(frozen=True)
class Shape:
    """A batch of requests of one length."""

    batch: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    def __str__(self) -> str:
        return f"{self.batch} x {self.seq_len:,}"


def num_copies(layer_bytes: int, l2_bytes: int) -> int:
    """Copies of a layer to go through in turn so that none is in the L2 cache when its turn comes."""
    return 1 + max(1, math.ceil(L2_TURNOVER * l2_bytes / layer_bytes))


def copies_that_fit(shape: Shape, token_bytes: int, l2_bytes: int, free_bytes: int) -> int:
    """Copies to make of a layer with ``token_bytes`` per token, 0 if there is no room for them."""
    # Slot 0 is SGLang's for padding.
    layer_bytes = (shape.tokens + 1) * token_bytes
    copies = num_copies(layer_bytes, l2_bytes)
    return copies if copies * layer_bytes <= MEMORY_SHARE * free_bytes else 0
