"""The byte layout of a cached token: what a key row and a value row contain, and where.

A token's key takes one row of bytes per KV head. A *raw* row is the key itself in a floating-point dtype.
A *compressed* row holds, in this order and without padding (D = head_dim, b = restore_bits, T = kept_channels):

==============  ==========  ====================================================================================
part            bytes       contents
==============  ==========  ====================================================================================
restore plane   D * b / 8   b bit planes of D bits each; bit j % 8 of byte j // 8 of a bit plane is channel j's
scales          4           two float16: plane scale, kept scale
kept words      2 * T       T 16-bit words in ascending channel order: channel number in the low index_bits, a
                            signed integer above them
==============  ==========  ====================================================================================

All numbers are little-endian. The key restored from a row is ``plane[j] + kept_scale * integer[j]``, the second
term only where channel j was kept. With the bits h (first bit plane) and l (second bit plane) read as +1 where
set and -1 where clear, the plane is

=====  =========================================  ==============================================================
b      plane[j]                                   plane scale
=====  =========================================  ==============================================================
0      0                                          0
1      ``plane_scale * h[j]``                     mean magnitude of the dropped channels
2      ``plane_scale / 4 * (2 * h[j] + l[j])``    largest magnitude of a dropped channel
=====  =========================================  ==============================================================

so h is the sign in both, and 2 bits give four uniform levels, -3/4, -1/4, 1/4 and 3/4 of the plane scale. The
plane is linear in its bits: a product with a query is a sum over bit planes of signed sums of query entries, and
one table of such sums per 4 or 8 channels serves both bit planes. No 4 or 8 bits of a bit plane straddle a 64-bit
word of the row.

A token's value takes one row per KV head as well: the value itself in a floating-point dtype, or *int4*:

==============  ==========  ====================================================================================
part            bytes       contents
==============  ==========  ====================================================================================
integers        D / 2       D / 4 16-bit words; bits 4i to 4i + 3 of word j are the integer of channel
                            i * D / 4 + j, from -8 to 7, plus 8
scales          8           four float16; number i belongs to channels i * D / 4 to (i + 1) * D / 4 - 1
==============  ==========  ====================================================================================

The value of a channel is its scale times its integer. Neighbouring words hold neighbouring channels, so one shift and
one mask of a vector of words give a vector of integers that have one scale.

This module is the only place that knows these offsets; ``spark_kernels.reference`` defines how they are filled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

HEAD_DIM_STEP = 16
MAX_HEAD_DIM = 256
RESTORE_BITS = (0, 1, 2)
MAX_KEY_RATIO = 0.95
RAW_KEY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VALUE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
# Groups of channels of an int4 value, one scale each; as many as a 16-bit word has integers.
INT4_GROUPS = 4
# Integers of an int4 value are from -INT4_LIMIT to INT4_LIMIT - 1.
INT4_LIMIT = 8

_ROW_ALIGNMENT = 8
_HALF_BYTES = 2
_SCALES_BYTES = 2 * _HALF_BYTES
_WORD_BYTES = 2
_WORD_BITS = 16
# Compression that does not beat a 16-bit key by at least one aligned step is pointless.
_DENSE_CHANNEL_BYTES = 2


class KeyFormat:
    """How one token's key of one KV head is stored.

    Instances are `CompressedKeyFormat` or `RawKeyFormat`; `from_ratio` chooses. Every format has

    - ``head_dim``: channels of a key,
    - ``row_bytes``: size of a row, a multiple of 8,
    - ``kept_channels``: channels stored as numbers (all of them in a raw row),
    - ``restore_bits``: bits per channel that estimate what was dropped (0 in a raw row),
    - ``is_raw``: whether the row is the key itself.
    """

    head_dim: int
    is_raw: bool

    @staticmethod
    def from_ratio(
        head_dim: int, key_ratio: float, restore_bits: int = 2, raw_dtype: torch.dtype = torch.bfloat16
    ) -> CompressedKeyFormat | RawKeyFormat:
        """The format that prunes at most ``key_ratio`` of the channels.

        Parameters
        ----------
        head_dim
            Channels of a key, a multiple of 16 from 16 to 256.
        key_ratio
            Share of channels that may be dropped (λ in SparK, arXiv 2508.15212, section 3): 0 stores the raw key
            in ``raw_dtype``; otherwise within `legal_key_ratios`. At least ``head_dim - int(key_ratio * head_dim)``
            channels are kept, and as many more as fit the aligned row.
        restore_bits
            Bits per channel of the restore plane: 0, 1 or 2. Not used with ratio 0.
        raw_dtype
            dtype of a raw row. Not used with a ratio above 0.

        Raises
        ------
        ValueError
            An argument is outside its range; the message names it, its value and the range.
        """
        if key_ratio == 0:
            return RawKeyFormat(head_dim, raw_dtype)
        low, high = legal_key_ratios(head_dim, restore_bits)
        if not low <= key_ratio <= high:
            raise ValueError(
                f"key_ratio={key_ratio} is not possible with head_dim={head_dim} and restore_bits={restore_bits}: "
                f"use 0 (raw keys) or a ratio from {math.ceil(low * 1000) / 1000:g} to {high:g}"
            )
        kept = head_dim - int(key_ratio * head_dim)
        needed = _plane_bytes(head_dim, restore_bits) + _SCALES_BYTES + _WORD_BYTES * kept
        row_bytes = math.ceil(needed / _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        return CompressedKeyFormat(head_dim, restore_bits, row_bytes)


@dataclass(frozen=True)
class RawKeyFormat(KeyFormat):
    """A key row that is the key itself: ``head_dim`` numbers of ``dtype``."""

    head_dim: int
    dtype: torch.dtype

    is_raw = True
    restore_bits = 0

    def __post_init__(self) -> None:
        _check_head_dim(self.head_dim)
        _check_member("dtype", self.dtype, RAW_KEY_DTYPES)

    @property
    def kept_channels(self) -> int:
        return self.head_dim

    @property
    def row_bytes(self) -> int:
        return self.head_dim * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.row_bytes} B: all {self.head_dim} channels in {_name(self.dtype)}"


@dataclass(frozen=True)
class CompressedKeyFormat(KeyFormat):
    """A key row of kept channels over a restore plane, in the layout described at the top of this module."""

    head_dim: int
    restore_bits: int
    row_bytes: int

    is_raw = False

    def __post_init__(self) -> None:
        _check_head_dim(self.head_dim)
        _check_member("restore_bits", self.restore_bits, RESTORE_BITS)
        low = self.kept_offset + _WORD_BYTES
        high = self.head_dim * _DENSE_CHANNEL_BYTES - _ROW_ALIGNMENT
        if self.row_bytes % _ROW_ALIGNMENT or not low <= self.row_bytes <= high:
            raise ValueError(
                f"row_bytes={self.row_bytes} is not possible with head_dim={self.head_dim} and "
                f"restore_bits={self.restore_bits}: use a multiple of {_ROW_ALIGNMENT} from {low} to {high}"
            )

    @property
    def plane_offset(self) -> int:
        """First byte of the restore plane; the second bit plane follows `bit_plane_bytes` later."""
        return 0

    @property
    def bit_plane_bytes(self) -> int:
        """Size of one bit plane; there are ``restore_bits`` of them."""
        return self.head_dim // 8

    @property
    def scale_offset(self) -> int:
        """First byte of the plane scale; the kept scale follows it."""
        return _plane_bytes(self.head_dim, self.restore_bits)

    @property
    def kept_offset(self) -> int:
        """First byte of the kept words."""
        return self.scale_offset + _SCALES_BYTES

    @property
    def kept_channels(self) -> int:
        """T, the channels kept as integers: what the row has room for."""
        return (self.row_bytes - self.kept_offset) // _WORD_BYTES

    @property
    def index_bits(self) -> int:
        """Low bits of a kept word that hold its channel number."""
        return (self.head_dim - 1).bit_length()

    @property
    def integer_max(self) -> int:
        """Largest magnitude of a kept word's integer, which has ``16 - index_bits`` bits and a symmetric range."""
        return 2 ** (_WORD_BITS - self.index_bits - 1) - 1

    def __str__(self) -> str:
        return (
            f"{self.row_bytes} B: {self.kept_channels} of {self.head_dim} channels kept, "
            f"{self.restore_bits} bit(s) per channel to restore the others"
        )


@dataclass(frozen=True)
class ValueFormat:
    """How one token's value of one KV head is stored: ``head_dim`` numbers of ``dtype``."""

    head_dim: int
    dtype: torch.dtype

    is_int4 = False

    def __post_init__(self) -> None:
        _check_head_dim(self.head_dim)
        _check_member("dtype", self.dtype, VALUE_DTYPES)

    @property
    def row_bytes(self) -> int:
        return self.head_dim * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """What users call it."""
        return _name(self.dtype)

    def __str__(self) -> str:
        return f"{self.row_bytes} B: {self.head_dim} channels in {self.dtype_name}"


@dataclass(frozen=True)
class Int4ValueFormat:
    """A value row of 4-bit integers with a scale per quarter, in the layout described at the top of this module."""

    head_dim: int

    is_int4 = True
    dtype_name = "int4"

    def __post_init__(self) -> None:
        _check_head_dim(self.head_dim)

    @property
    def group_channels(self) -> int:
        """Channels that share a scale, and 16-bit words of integers."""
        return self.head_dim // INT4_GROUPS

    @property
    def scale_offset(self) -> int:
        """First byte of the scales."""
        return _WORD_BYTES * self.group_channels

    @property
    def row_bytes(self) -> int:
        return self.scale_offset + _HALF_BYTES * INT4_GROUPS

    def __str__(self) -> str:
        return f"{self.row_bytes} B: {self.head_dim} channels in int4, a scale per {self.group_channels}"


@dataclass(frozen=True)
class LayerRows:
    """One layer's cache as kernels see it.

    Parameters
    ----------
    keys
        uint8 ``[num_slots, num_kv_heads, key_format.row_bytes]``, contiguous.
    values
        uint8 ``[num_slots, num_kv_heads, value_format.row_bytes]``, contiguous, on the device of ``keys``.
    key_format, value_format
        The meaning of the rows. ``value_format.head_dim`` may differ from ``key_format.head_dim``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_format: CompressedKeyFormat | RawKeyFormat
    value_format: ValueFormat | Int4ValueFormat

    def __post_init__(self) -> None:
        for name, rows, row_bytes in (
            ("keys", self.keys, self.key_format.row_bytes),
            ("values", self.values, self.value_format.row_bytes),
        ):
            if rows.dtype != torch.uint8 or rows.dim() != 3 or rows.shape[2] != row_bytes:
                raise ValueError(
                    f"{name} must be uint8 [num_slots, num_kv_heads, {row_bytes}], "
                    f"got {_name(rows.dtype)} {list(rows.shape)}"
                )
            if not rows.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got strides {rows.stride()}")
        if self.keys.shape[:2] != self.values.shape[:2]:
            raise ValueError(
                f"keys and values must agree in slots and KV heads, "
                f"got {list(self.keys.shape[:2])} and {list(self.values.shape[:2])}"
            )
        if self.keys.device != self.values.device:
            raise ValueError(f"keys are on {self.keys.device}, values on {self.values.device}")

    @classmethod
    def allocate(
        cls,
        num_slots: int,
        num_kv_heads: int,
        key_format: CompressedKeyFormat | RawKeyFormat,
        value_format: ValueFormat | Int4ValueFormat,
        device: torch.device | str = "cpu",
    ) -> LayerRows:
        """Zeroed rows for ``num_slots`` tokens."""
        shape = (num_slots, num_kv_heads)
        return cls(
            torch.zeros(*shape, key_format.row_bytes, dtype=torch.uint8, device=device),
            torch.zeros(*shape, value_format.row_bytes, dtype=torch.uint8, device=device),
            key_format,
            value_format,
        )

    @property
    def num_slots(self) -> int:
        return self.keys.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        return self.keys.device


def legal_key_ratios(head_dim: int, restore_bits: int) -> tuple[float, float]:
    """Smallest and largest ``key_ratio`` above 0 for which rows are smaller than 16-bit keys.

    Ratio 0 (raw keys) is always legal besides.
    """
    _check_head_dim(head_dim)
    _check_member("restore_bits", restore_bits, RESTORE_BITS)
    largest_row = head_dim * _DENSE_CHANNEL_BYTES - _ROW_ALIGNMENT
    most_kept = (largest_row - _plane_bytes(head_dim, restore_bits) - _SCALES_BYTES) // _WORD_BYTES
    return (head_dim - most_kept) / head_dim, MAX_KEY_RATIO


def _plane_bytes(head_dim: int, restore_bits: int) -> int:
    return head_dim * restore_bits // 8


def _check_head_dim(head_dim: int) -> None:
    if head_dim not in range(HEAD_DIM_STEP, MAX_HEAD_DIM + 1, HEAD_DIM_STEP):
        raise ValueError(
            f"head_dim={head_dim} is not possible: use a multiple of {HEAD_DIM_STEP} "
            f"from {HEAD_DIM_STEP} to {MAX_HEAD_DIM}"
        )


def _check_member(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={_name(value)} is not possible: use one of {', '.join(map(_name, choices))}")


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")
