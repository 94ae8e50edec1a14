"""What is timed: heads, formats of rows, and the shapes of batches that fit the memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import spark_kernels as sk

VALUE_DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "int4")
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
    """Formats of keys and values; ``raw_dtype`` is that of keys at ratio 0."""

    key_ratio: float = 0.8
    restore_bits: int = 2
    value_dtype: str = "bfloat16"
    raw_dtype: torch.dtype = torch.bfloat16

    def key_format(self, head_dim: int) -> sk.CompressedKeyFormat | sk.RawKeyFormat:
        return sk.KeyFormat.from_ratio(head_dim, self.key_ratio, self.restore_bits, self.raw_dtype)

    def value_format(self, head_dim: int) -> sk.ValueFormat | sk.Int4ValueFormat:
        if self.value_dtype == "int4":
            return sk.Int4ValueFormat(head_dim)
        return sk.ValueFormat(head_dim, getattr(torch, self.value_dtype))

    def rows(self, num_slots: int, heads: Heads, device: torch.device | str) -> sk.LayerRows:
        """Zeroed rows of one layer."""
        formats = self.key_format(heads.head_dim), self.value_format(heads.head_dim)
        return sk.LayerRows.allocate(num_slots, heads.num_kv_heads, *formats, device)

    def bytes_per_token(self, heads: Heads) -> int:
        """Of one layer."""
        formats = self.key_format(heads.head_dim), self.value_format(heads.head_dim)
        return heads.num_kv_heads * sum(one.row_bytes for one in formats)

    def __str__(self) -> str:
        keys = "raw keys" if self.key_ratio == 0 else f"ratio {self.key_ratio}, {self.restore_bits} bits"
        return f"{keys}, {self.value_dtype} values"


STANDARD_SETTINGS = (Setting(), Setting(value_dtype="float8_e4m3fn"), Setting(value_dtype="int4"))


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
