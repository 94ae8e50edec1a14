"""Rows as kernels take them: codes as vectors of 16, and what else a format and a calibration come to.

A plane is read 16 bytes at a time, one to a lane. A *field* is the codes at one shift within those bytes; fields come
in pairs, at neighbouring shifts of the same bytes. Which position a lane's code belongs to is a table, so that products
need no permutation: queries are brought into the order of the lanes once, and sums of values back once.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from spark_kernels.calibration import Restoration
from spark_kernels.cpu.vector_types import LANES
from spark_kernels.formats import Numbers, Plane, Pruned, ValueFormat
from spark_kernels.rows import LayerRows

# How a row of numbers is stored, and rows that are not numbers.
BFLOAT16, FLOAT16, FLOAT32, FLOAT8, CODES = range(5)
_NUMBER_CODES = {
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float32: FLOAT32,
    torch.float8_e4m3fn: FLOAT8,
}


class Fields(NamedTuple):
    """The planes of a format.

    ``pairs`` (int32 ``[n, 3]``) has each pair's first byte, first shift and bits; ``positions`` (int32
    ``[2 * n, 16]``) the position of each field's lanes, -1 of a lane that counts for nothing; ``planes`` (int32
    ``[num_planes, 5]``) each plane's bits, first position, first byte, number of bytes and shift within codes;
    ``middles`` (float32 ``[channels]``) what is added to a code before it is scaled, ``1/2 - 2 ** (bits - 1)``.
    """

    pairs: np.ndarray
    positions: np.ndarray
    planes: np.ndarray
    middles: np.ndarray

    @classmethod
    def of(cls, planes: tuple[Plane, ...], row_bytes: int, bits: int, head_dim: int) -> Fields:
        pairs, positions = [], []
        middles = np.full(head_dim, 0.5 - 2.0 ** (bits - 1) if bits else 0.0, np.float32)
        for plane in planes:
            if not bits:
                middles[plane.start : plane.start + plane.channels] = 0.5 - 2.0 ** (plane.bits - 1)
            for first in range(plane.offset, plane.end, LANES):
                start = min(first, row_bytes - LANES)
                for shift in range(0, 8, 2 * plane.bits):
                    pairs.append((start, shift, plane.bits))
                    positions += [_positions(plane, first, start, s) for s in (shift, shift + plane.bits)]
        return cls(
            np.array(pairs, np.int32).reshape(-1, 3),
            np.array(positions, np.int32).reshape(-1, LANES),
            np.array([(p.bits, p.start, p.offset, p.end - p.offset, p.shift) for p in planes], np.int32).reshape(-1, 5),
            middles,
        )


def _positions(plane: Plane, first: int, start: int, shift: int) -> list[int]:
    """Positions of the codes at ``shift`` of 16 bytes from ``start`` on, of which those before ``first`` are done."""
    positions = []
    for byte in range(start, start + LANES):
        position = plane.start + (8 * (byte - plane.offset) + shift) // plane.bits
        positions.append(position if first <= byte < plane.end else -1)
    return positions


class KeyLayout(NamedTuple):
    """What kernels need of key rows: ints and arrays, the latter empty of rows of numbers.

    ``scales``, ``kept`` and ``end`` are offsets in 16-bit words: of tau, of the kept words and of what follows them.
    Then come the `Fields` and the `spark_kernels.calibration.Restoration`: numba's loops take tuples of one level only.
    """

    code: int
    scales: int
    kept: int
    end: int
    magnitude_bits: int
    position_bits: int
    restored_channels: int
    pairs: np.ndarray
    positions: np.ndarray
    planes: np.ndarray
    middles: np.ndarray
    order: np.ndarray
    position: np.ndarray
    centre: np.ndarray
    inverse_step: np.ndarray
    unit: np.ndarray
    inverse_unit: np.ndarray


class ValueLayout(NamedTuple):
    """What kernels need of value rows: ``scale`` is the offset of the scale in 16-bit words, the rest is of `Integers`.

    ``lanes`` (int32 ``[num_planes, head_dim]``) is where the sums of each channel's codes are, among all lanes of all
    fields.
    """

    code: int
    scale: int
    bits: int
    block: int
    pairs: np.ndarray
    positions: np.ndarray
    planes: np.ndarray
    middles: np.ndarray
    lanes: np.ndarray


def key_layout(rows: LayerRows) -> KeyLayout:
    """Of a layer's keys; made once, because every step asks for every layer's."""
    if rows not in _key_layouts:
        _key_layouts[rows] = _make_key_layout(rows)
    return _key_layouts[rows]


_key_layouts: WeakKeyDictionary[LayerRows, KeyLayout] = WeakKeyDictionary()


def _make_key_layout(rows: LayerRows) -> KeyLayout:
    made = rows.key_format
    if isinstance(made, Numbers):
        return KeyLayout(_NUMBER_CODES[made.dtype], 0, 0, 0, 0, 0, 0, *_NO_FIELDS, *_NO_RESTORATION)
    kept = made.kept_offset // 2
    return KeyLayout(
        CODES,
        made.scale_offset // 2,
        kept,
        kept + made.kept_channels,
        made.magnitude_bits,
        made.position_bits,
        made.restored_channels,
        *_key_fields(made),
        *(tensor.numpy() for tensor in rows.restoration),
    )


@cache
def value_layout(made: ValueFormat) -> ValueLayout:
    """Of values of a format."""
    if isinstance(made, Numbers):
        return ValueLayout(_NUMBER_CODES[made.dtype], 0, 0, 0, *_NO_FIELDS, np.empty((0, 0), np.int32))
    fields = Fields.of(made.planes, made.row_bytes, made.bits, made.head_dim)
    lanes = np.empty((len(made.planes), made.head_dim), np.int32)
    for plane, of_plane in zip(made.planes, lanes, strict=True):
        is_mine = np.repeat(fields.pairs[:, 2] == plane.bits, 2)[:, None] & (fields.positions >= 0)
        of_plane[fields.positions[is_mine]] = np.flatnonzero(is_mine)
    return ValueLayout(CODES, made.scale_offset // 2, made.bits, made.block, *fields, lanes)


@cache
def _key_fields(made: Pruned) -> Fields:
    return Fields.of(made.planes, made.row_bytes, 0, made.head_dim)


_NO_FIELDS = Fields.of((), 0, 0, 0)
_NO_RESTORATION = tuple(
    np.empty((0, 0), np.int32 if name in ("order", "position") else np.float32) for name in Restoration._fields
)
