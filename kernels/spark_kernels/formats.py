"""The bytes of a cached token: what a key row and a value row contain, and where.

A token's key takes one row of bytes per KV head, and so does its value. Three codecs say how a row is read:

- `Numbers`: the key or value itself in a floating-point dtype.
- `Integers`: a value after a Hadamard transform, as integers of 3 or 4 bits with one scale.
- `Pruned`: a key less its centre, restored from integers of 4, 2, 1 or 0 bits per channel, and exact to an integer in
  the few channels that matter most to the queries (SparK, arXiv 2508.15212, section 3).

A pruned row, D = head_dim, T = kept_channels. Channels stand in the order of their importance to the layer's KV head
(`spark_kernels.calibration.KeyCalibration.order`); a *position* is a place in that order. The first positions have 4
bits, the next 2, then 1, and the last none, as the format's profile says.

==============  ==========  ===========================================================================================
part            bytes       contents
==============  ==========  ===========================================================================================
planes          see below   the codes of all positions with 4 bits, then of those with 2, then of those with 1
scales          4           two float16: tau, the token's scale of restoration, and kappa, of its kept integers
kept words      2 * T       T 16-bit words in ascending order of position. Above the magnitude of an integer in the low
                            ``magnitude_bits``: the position, and its sign in the highest bit
zeros                       up to the next multiple of 8, and to 16
==============  ==========  ===========================================================================================

A code c of b bits stands for ``(c + 1/2 - 2 ** (b - 1)) * unit * tau``, with ``unit`` the channel's step times
`UNIT_STEPS` of b and `KEY_STEP`: levels of a uniform quantiser for a channel of that deviation. A position without bits
stands for 0. The restored key is the centre plus that, plus ``kappa * integer`` where the channel was kept.

An integer row: planes (4 bits; or 2 bits and, above them, 1 bit), then one float16 scale, then zeros up to the next
multiple of 8, and to 16. A code c stands for ``(c + 1/2 - 2 ** (bits - 1)) * scale`` of the transformed value; see
`spark_kernels.reference.hadamard`.

A *plane* is codes of b bits one after the other, from the lowest bits of the first byte up. All numbers are
little-endian.

This module is the only place that knows these offsets; ``spark_kernels.reference`` defines how they are filled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

HEAD_DIM_STEP = 16
MAX_HEAD_DIM = 256
NUMBER_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
INTEGER_BITS = (4, 3)
# Widths of a profile's channels, in the order of the counts.
WIDTHS = (4, 2, 1, 0)
MAX_KEY_RATIO = 0.99
# Eighths of the channels with each width, by the average width. Narrow averages do best with a few wide channels.
_EIGHTHS = {4: (8, 0, 0, 0), 3: (4, 4, 0, 0), 2: (2, 3, 2, 1), 1: (0, 2, 4, 2), 0: (0, 0, 0, 8)}
# Levels of the uniform quantiser of b bits with the least squared error for a normal distribution of deviation 1 are so
# far apart (J. Max, Quantizing for minimum distortion, 1960).
UNIT_STEPS = {4: 0.3352, 3: 0.586, 2: 0.9957, 1: 1.596, 0: 0.0}
# Levels of a pruned key are closer by this factor: numbers beyond the last level are what kept channels are for. Of
# factors from 0.6 to 1, those near 0.75 lose least on real models, a third less than 1.
KEY_STEP = 0.75

_ROW_ALIGNMENT = 8
# Kernels read rows 16 bytes at a time.
_LEAST_ROW = 16
_WORD_BYTES = 2
_WORD_BITS = 16
_SCALES_BYTES = 4
# A row that is no smaller than a 16-bit key is pointless.
_DENSE_CHANNEL_BYTES = 2


@dataclass(frozen=True)
class Plane:
    """Codes of ``bits`` bits for ``channels`` channels from ``start`` on, at byte ``offset`` of a row.

    ``shift`` is the place of a code's lowest bit in the integer it is part of (0 but in the upper plane of 3 bits).
    """

    bits: int
    start: int
    channels: int
    offset: int
    shift: int = 0

    @property
    def end(self) -> int:
        """Byte after the plane, a whole number of 16-bit words from its first."""
        return self.offset + self.channels * self.bits // 8


@dataclass(frozen=True)
class Numbers:
    """A row of ``head_dim`` numbers of ``dtype``: the key or value itself."""

    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        _check_head_dim(self.head_dim)
        _check_member("dtype", self.dtype, NUMBER_DTYPES)

    @property
    def row_bytes(self) -> int:
        return self.head_dim * self.dtype.itemsize

    @property
    def name(self) -> str:
        return dtype_name(self.dtype)

    def __str__(self) -> str:
        return f"{self.row_bytes} B: {self.head_dim} channels in {self.name}"


@dataclass(frozen=True)
class Integers:
    """A value row of integers of ``bits`` bits with one scale, in the layout described at the top of this module."""

    head_dim: int
    bits: int = 4

    def __post_init__(self) -> None:
        _check_head_dim(self.head_dim)
        _check_member("bits", self.bits, INTEGER_BITS)

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        if self.bits == 4:
            return (Plane(4, 0, self.head_dim, 0),)
        low = Plane(2, 0, self.head_dim, 0)
        return low, Plane(1, 0, self.head_dim, low.end, shift=2)

    @property
    def scale_offset(self) -> int:
        """First byte of the scale."""
        return self.planes[-1].end

    @property
    def row_bytes(self) -> int:
        return _aligned(self.scale_offset + _WORD_BYTES)

    @property
    def block(self) -> int:
        """Channels that a Hadamard transform mixes: the largest power of two that divides ``head_dim``."""
        return self.head_dim & -self.head_dim

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def __str__(self) -> str:
        return f"{self.row_bytes} B: {self.head_dim} channels in {self.name} after a Hadamard transform"


@dataclass(frozen=True)
class Pruned:
    """A key row of restored and kept channels, in the layout described at the top of this module.

    Parameters
    ----------
    head_dim
        Channels of a key, a multiple of 16 from 16 to 256.
    profile
        How many channels have 4, 2, 1 and 0 bits: multiples of 8, and of 16 those with 1 bit.
    kept_channels
        T, the channels of each token that are kept as integers.

    Raises
    ------
    ValueError
        An argument is outside its range; the message names it, its value and the range.
    """

    head_dim: int
    profile: tuple[int, int, int, int]
    kept_channels: int

    def __post_init__(self) -> None:
        _check_head_dim(self.head_dim)
        counts = self.profile
        if len(counts) != len(WIDTHS) or sum(counts) != self.head_dim or min(counts) < 0:
            raise ValueError(
                f"profile={counts} is not possible with head_dim={self.head_dim}: use the numbers of channels with "
                f"{', '.join(map(str, WIDTHS))} bits, {self.head_dim} in all"
            )
        if not _is_packable(counts):
            raise ValueError(f"profile={counts} is not possible: use multiples of 8, and of 16 for channels with 1 bit")
        most = min(self.head_dim, (self._largest_row - self.kept_offset) // _WORD_BYTES)
        if not 1 <= self.kept_channels <= most:
            raise ValueError(
                f"kept_channels={self.kept_channels} is not possible with head_dim={self.head_dim} and "
                f"profile={counts}: use 1 to {most}"
            )

    @classmethod
    def from_ratio(cls, head_dim: int, key_ratio: float, restore_bits: float) -> Pruned:
        """The format that keeps at least ``1 - key_ratio`` of the channels, and as many more as fit the aligned row.

        Parameters
        ----------
        head_dim
            Channels of a key.
        key_ratio
            Share of channels that are not kept (lambda in SparK), above 0: within `legal_key_ratios`.
        restore_bits
            Bits per channel of the restoration, on average, 0 to 4: see `profile_of`.
        """
        profile = profile_of(head_dim, restore_bits)
        low, high = legal_key_ratios(head_dim, restore_bits)
        if not low <= key_ratio <= high:
            raise ValueError(
                f"key_ratio={key_ratio} is not possible with head_dim={head_dim} and restore_bits={restore_bits:g}: "
                f"use 0 (whole keys) or a ratio from {math.ceil(low * 1000) / 1000:g} to {high:g}"
            )
        kept_offset = _plane_bytes(profile) + _SCALES_BYTES
        # A legal ratio may come out a rounding error below the whole number of channels that it stands for.
        kept = head_dim - int(key_ratio * head_dim + 1e-9)
        row_bytes = _aligned(kept_offset + _WORD_BYTES * kept)
        return cls(head_dim, profile, min(head_dim, (row_bytes - kept_offset) // _WORD_BYTES))

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """The planes of the widths that some channel has, widest first."""
        planes: list[Plane] = []
        start = offset = 0
        for bits, channels in zip(WIDTHS, self.profile, strict=True):
            if bits and channels:
                planes.append(Plane(bits, start, channels, offset))
                offset = planes[-1].end
            start += channels
        return tuple(planes)

    @property
    def restored_channels(self) -> int:
        """Channels with at least one bit: the first positions."""
        return self.head_dim - self.profile[WIDTHS.index(0)]

    @property
    def restore_bits(self) -> float:
        """Bits per channel of the restoration, on average."""
        return sum(map(math.prod, zip(WIDTHS, self.profile, strict=True))) / self.head_dim

    @property
    def scale_offset(self) -> int:
        """First byte of tau; kappa follows it."""
        return _plane_bytes(self.profile)

    @property
    def kept_offset(self) -> int:
        """First byte of the kept words."""
        return self.scale_offset + _SCALES_BYTES

    @property
    def row_bytes(self) -> int:
        return _aligned(self.kept_offset + _WORD_BYTES * self.kept_channels)

    @property
    def position_bits(self) -> int:
        """Bits of a kept word that hold its position, under the sign."""
        return (self.head_dim - 1).bit_length()

    @property
    def magnitude_bits(self) -> int:
        """Low bits of a kept word, which hold the magnitude of its integer."""
        return _WORD_BITS - 1 - self.position_bits

    @property
    def integer_max(self) -> int:
        """Largest magnitude of a kept word's integer."""
        return 2**self.magnitude_bits - 1

    @property
    def _largest_row(self) -> int:
        return self.head_dim * _DENSE_CHANNEL_BYTES - _ROW_ALIGNMENT

    def __str__(self) -> str:
        return (
            f"{self.row_bytes} B: {self.kept_channels} of {self.head_dim} channels kept, "
            f"{self.restore_bits:g} bits per channel to restore the others"
        )


KeyFormat = Pruned | Numbers
ValueFormat = Integers | Numbers


def profile_of(head_dim: int, restore_bits: float) -> tuple[int, int, int, int]:
    """Channels with 4, 2, 1 and 0 bits for an average width of ``restore_bits``.

    Between whole averages, of which `_EIGHTHS` says the shares, shares are in proportion.

    Raises
    ------
    ValueError
        The average is outside 0 to 4, or its counts are not possible (see `Pruned`).
    """
    _check_head_dim(head_dim)
    profile = _profile(head_dim, restore_bits)
    if profile:
        return profile
    raise ValueError(
        f"restore_bits={restore_bits} is not possible with head_dim={head_dim}: use one of "
        f"{', '.join(f'{bits:g}' for bits in legal_restore_bits(head_dim))}"
    )


def legal_restore_bits(head_dim: int) -> list[float]:
    """Average widths that have a profile, ascending."""
    steps = head_dim // 4
    return [step / steps for step in range(4 * steps + 1) if _profile(head_dim, step / steps)]


def _profile(head_dim: int, restore_bits: float) -> tuple[int, int, int, int] | None:
    if not 0 <= restore_bits <= 4:
        return None
    low = min(int(restore_bits), 3)
    weight = restore_bits - low
    exact = [head_dim * (a + weight * (b - a)) / 8 for a, b in zip(_EIGHTHS[low], _EIGHTHS[low + 1], strict=True)]
    counts = tuple(round(count) for count in exact)
    # An average such as 3.333 need not be written in full.
    is_close = all(abs(a - b) < 0.05 for a, b in zip(exact, counts, strict=True))
    return counts if is_close and sum(counts) == head_dim and _is_packable(counts) else None


def _is_packable(counts: tuple[int, ...]) -> bool:
    """Whether kernels that have 8 channels to a thread can pack these widths, and planes end with a 16-bit word."""
    return not any(count % 8 for count in counts) and counts[WIDTHS.index(1)] % 16 == 0


def legal_key_ratios(head_dim: int, restore_bits: float) -> tuple[float, float]:
    """Smallest and largest ``key_ratio`` above 0 for which rows are smaller than 16-bit keys.

    Ratio 0 (whole keys) is always legal besides.
    """
    profile = profile_of(head_dim, restore_bits)
    largest_row = head_dim * _DENSE_CHANNEL_BYTES - _ROW_ALIGNMENT
    most_kept = (largest_row - _plane_bytes(profile) - _SCALES_BYTES) // _WORD_BYTES
    return max(0, head_dim - most_kept) / head_dim, MAX_KEY_RATIO


def _plane_bytes(profile: tuple[int, int, int, int]) -> int:
    return sum(map(math.prod, zip(WIDTHS, profile, strict=True))) // 8


def _aligned(size: int) -> int:
    return max(_LEAST_ROW, math.ceil(size / _ROW_ALIGNMENT) * _ROW_ALIGNMENT)


def _check_head_dim(head_dim: int) -> None:
    if head_dim not in range(HEAD_DIM_STEP, MAX_HEAD_DIM + 1, HEAD_DIM_STEP):
        raise ValueError(
            f"head_dim={head_dim} is not possible: use a multiple of {HEAD_DIM_STEP} "
            f"from {HEAD_DIM_STEP} to {MAX_HEAD_DIM}"
        )


def _check_member(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(
            f"{name}={dtype_name(value)} is not possible: use one of {', '.join(map(dtype_name, choices))}"
        )


def dtype_name(value: object) -> str:
    """What users call a dtype; anything else as it is."""
    return str(value).removeprefix("torch.")
