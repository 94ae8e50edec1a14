"""Value rows in Triton: written in all formats, and int4 ones read.

Writing follows `spark_kernels.reference` operation by operation, like the rest of the write kernel.

A 16-bit word of an int4 row has an integer of each of the value's four groups. Put under the exponent of 1024, four
bits are the mantissa of a float16, so that a mask and a multiply-add convert two channels at once; converting integers
takes several times as long.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from spark_kernels.gpu.lanes import all_of_row, load_channels, row_max, row_min
from spark_kernels.formats import INT4_GROUPS, INT4_LIMIT, Int4ValueFormat, LayerRows

_LIMIT = tl.constexpr(INT4_LIMIT)
FLOAT16_MAX = tl.constexpr(torch.finfo(torch.float16).max)
HALF_NAN = tl.constexpr(0x7E00)
# float16 bits of 1024, whose mantissa counts ones.
_BITS_OF_1024 = tl.constexpr(0x6400)
# 1.5 * 2**23: to add and subtract it rounds a float32 to the nearest integer, ties to even.
ROUNDER = tl.constexpr(12582912.0)


class Int4Layout(NamedTuple):
    """An int4 row as these functions read it: sizes and offsets in 16-bit words."""

    groups: int
    group_channels: int
    scale_half: int
    row_halves: int

    @classmethod
    def of(cls, value_format: Int4ValueFormat) -> Int4Layout:
        return cls(
            groups=INT4_GROUPS,
            group_channels=value_format.group_channels,
            scale_half=value_format.scale_offset // 2,
            row_halves=value_format.row_bytes // 2,
        )


@triton.jit
def _low_integers(words):
    """float16 integers in bits 0 to 3 of 16-bit words."""
    return ((words & 0xF) | _BITS_OF_1024).to(tl.int16).to(tl.float16, bitcast=True) - (1024.0 + _LIMIT)


@triton.jit
def _high_integers(words):
    """float16 integers in bits 4 to 7 of 16-bit words; every step is exact."""
    return ((words & 0xF0) | _BITS_OF_1024).to(tl.int16).to(tl.float16, bitcast=True) * 0.0625 - (64.0 + _LIMIT)


@triton.jit
def _scale(scales, i: tl.constexpr):
    """The i-th of four float16 in 64-bit words, as a column."""
    return ((scales >> (16 * i)) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)[:, None]


@triton.jit
def _beside(a, b):
    """``[n, 2 * m]`` with ``a`` in the left and ``b`` in the right half."""
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def load_int4(values_ptr, rows, live, LAYOUT: tl.constexpr):
    """float16 ``[n, head_dim]``, the values of ``rows`` of ``values_ptr``, a pointer to 16-bit words; 0 if not live.

    No product exceeds float16: a scale is at most an eighth of its largest number.
    """
    row = values_ptr + rows * LAYOUT.row_halves
    words = tl.load(row[:, None] + tl.arange(0, LAYOUT.group_channels)[None, :], mask=live[:, None], other=0)
    scales = tl.load((row + LAYOUT.scale_half).to(tl.pointer_type(tl.int64)), mask=live, other=0)
    a = _low_integers(words) * _scale(scales, 0)
    b = _high_integers(words) * _scale(scales, 1)
    words >>= 8
    c = _low_integers(words) * _scale(scales, 2)
    d = _high_integers(words) * _scale(scales, 3)
    return _beside(_beside(a, b), _beside(c, d))


@triton.jit
def restore_int4(values_ptr, rows, exists, LAYOUT: tl.constexpr):
    """float32 ``[n, head_dim]`` like `load_int4`, with exact products."""
    channels = tl.arange(0, LAYOUT.groups * LAYOUT.group_channels)[None, :]
    row = values_ptr + (rows * LAYOUT.row_halves)[:, None]
    group = channels // LAYOUT.group_channels
    words = tl.load(row + channels % LAYOUT.group_channels, mask=exists[:, None], other=0).to(tl.int32)
    scales = tl.load(row + LAYOUT.scale_half + group, mask=exists[:, None], other=0).to(tl.float16, bitcast=True)
    integers = ((words >> (4 * group)) & (2 * _LIMIT - 1)) - _LIMIT
    return integers.to(tl.float32) * scales.to(tl.float32)


@triton.jit
def _int4_group(v_ptr, v_scale, SCALED: tl.constexpr, COUNT: tl.constexpr):
    """float16 bits of a group's scale, as a column, and the numbers from 0 to 15 of a lane's ``COUNT`` channels."""
    v = load_channels(v_ptr, COUNT)
    if SCALED:
        scaled = ()
        for i in tl.static_range(COUNT):
            scaled = scaled + (tl.div_rn(v[i], v_scale + tl.zeros_like(v[i])),)
        v = scaled
    high = v[0]
    low = v[0]
    is_number = v[0] == v[0]
    for i in tl.static_range(1, COUNT):
        high = tl.maximum(high, v[i])
        low = tl.minimum(low, v[i])
        is_number &= v[i] == v[i]
    high = tl.minimum(row_max(high), FLOAT16_MAX)
    low = tl.maximum(row_min(low), -FLOAT16_MAX)
    is_number = all_of_row(is_number)

    # Negative where only a positive number has the largest magnitude.
    scale = (tl.where(-low >= high, tl.abs(low), -high) * (1.0 / _LIMIT)).to(tl.float16)
    step = scale.to(tl.float32)
    has_steps = (tl.abs(step) > 0) & is_number
    inverse = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), tl.where(has_steps, step, 1.0))
    least = tl.where(has_steps, -_LIMIT * 1.0, 0.0)
    most = tl.where(has_steps, _LIMIT - 1.0, 0.0)
    integers = ()
    for i in tl.static_range(COUNT):
        steps = tl.minimum(tl.maximum(v[i] * inverse, least), most)
        # The low bits of the sum are the rounded integer's.
        integers = integers + ((steps + (ROUNDER + _LIMIT)).to(tl.int32, bitcast=True) & (2 * _LIMIT - 1),)
    return tl.where(is_number, scale.to(tl.int16, bitcast=True), HALF_NAN).to(tl.int16), integers


@triton.jit
def _store_int4(v_ptr, v_scale, row, SCALED: tl.constexpr, LAYOUT: tl.constexpr, CHANNELS: tl.constexpr):
    """Pack the values at ``v_ptr`` into the 16-bit words at ``row``, columns of pointers; a lane has whole words."""
    GROUPS: tl.constexpr = LAYOUT.groups
    WORDS: tl.constexpr = CHANNELS // GROUPS
    first_word = WORDS * tl.arange(0, LAYOUT.group_channels // WORDS)[None, :]
    scale, words = _int4_group(v_ptr + first_word, v_scale, SCALED, WORDS)
    tl.store(row + LAYOUT.scale_half, scale)
    for group in tl.static_range(1, GROUPS):
        scale, integers = _int4_group(v_ptr + group * LAYOUT.group_channels + first_word, v_scale, SCALED, WORDS)
        tl.store(row + LAYOUT.scale_half + group, scale)
        merged = ()
        for i in tl.static_range(WORDS):
            merged = merged + (words[i] | (integers[i] << (4 * group)),)
        words = merged
    for i in tl.static_range(WORDS):
        tl.store(row + first_word + i, words[i].to(tl.int16))


@triton.jit
def _float8_bits(x):
    """uint8 bits of the float8_e4m3fn nearest to a float32 within ±448, ties to even; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Three bits of mantissa are left of 23; the exponent's bias falls from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 numbers are multiples of 2**-9.
    small = tl.minimum(tl.abs(x), 1.0) * 512.0
    subnormal = ((small + ROUNDER) - ROUNDER).to(tl.int32)
    code = tl.where(magnitude >= 0x3C800000, normal, subnormal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _encode_value(v, v_scale, SCALED: tl.constexpr, LIMIT: tl.constexpr, dtype: tl.constexpr):
    if SCALED:
        v = tl.div_rn(v.to(tl.float32), v_scale + tl.zeros_like(v).to(tl.float32))
    if LIMIT > 0:
        v = v.to(tl.float32)
        v = tl.where(v > LIMIT, LIMIT, tl.where(v < -LIMIT, -LIMIT, v))
    return _float8_bits(v.to(tl.float32)) if dtype == tl.uint8 else v.to(dtype)


@triton.jit
def store_values(
    v_ptr,
    v_scale,
    values_ptr,
    rows,
    HEAD_DIM: tl.constexpr,
    LAYOUT: tl.constexpr,
    SCALED: tl.constexpr,
    LIMIT: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Store the values at ``v_ptr``, a column of pointers, as ``rows``, a column of row numbers.

    The other arguments are as `written_values` gives them, and the channels of a lane.
    """
    if LAYOUT is None:
        channels = tl.arange(0, HEAD_DIM)[None, :]
        v = _encode_value(tl.load(v_ptr + channels), v_scale, SCALED, LIMIT, values_ptr.dtype.element_ty)
        tl.store(values_ptr + rows * HEAD_DIM + channels, v)
    else:
        _store_int4(v_ptr, v_scale, values_ptr + rows * LAYOUT.row_halves, SCALED, LAYOUT, CHANNELS)


def written_values(rows: LayerRows, v: torch.Tensor, v_scale: float) -> tuple[torch.Tensor, dict[str, object]]:
    """Value rows as the write kernel takes them, and its compile-time arguments for them.

    float8 rows are uint8 and int4 rows 16-bit words; the latter have a ``V_LAYOUT``. ``V_LIMIT`` is the magnitude at
    which channels saturate before they are converted, 0 for none.
    """
    value_format = rows.value_format
    arguments = {"V_HEAD_DIM": value_format.head_dim, "V_LAYOUT": None, "V_SCALED": v_scale != 1.0, "V_LIMIT": 0.0}
    if value_format.is_int4:
        return rows.values.view(torch.int16), arguments | {"V_LAYOUT": Int4Layout.of(value_format)}
    is_float8 = value_format.dtype == torch.float8_e4m3fn
    if is_float8 or (value_format.dtype == torch.float16 and (v_scale != 1.0 or v.dtype != torch.float16)):
        arguments["V_LIMIT"] = torch.finfo(value_format.dtype).max
    return rows.values if is_float8 else rows.values.view(value_format.dtype), arguments
