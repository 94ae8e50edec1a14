"""Values to rows.

The arithmetic follows `spark_kernels.reference` operation by operation, like the rest of the write kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from spark_kernels.formats import UNIT_STEPS, Integers
from spark_kernels.gpu.lanes import load_channels, row_sum
from spark_kernels.gpu.pack import (
    FLOAT16_MAX,
    HALF_NAN,
    INFINITY,
    ROUNDER,
    half_bits,
    half_value,
    inverse_of,
    largest_magnitude,
)
from spark_kernels.gpu.rows import IntegersLayout
from spark_kernels.reference import (
    LARGEST_SCALE,
    LEAST_REACH,
    VALUE_PRODUCT_ONE,
    VALUE_SQUARE_ONE,
    hadamard_scales,
)
from spark_kernels.rows import LayerRows

_LEAST_REACH = tl.constexpr(LEAST_REACH)
_LARGEST_SCALE = tl.constexpr(LARGEST_SCALE)
_PRODUCT_ONE = tl.constexpr(VALUE_PRODUCT_ONE)
_SQUARE_ONE = tl.constexpr(VALUE_SQUARE_ONE)


@triton.jit
def _transform(x, CHANNELS: tl.constexpr):
    """The Hadamard transform of each row: of channels within a lane first, then of lanes."""
    for stage in tl.static_range(8):
        if (1 << stage) < CHANNELS:
            y = ()
            for i in tl.static_range(CHANNELS):
                if i & (1 << stage):
                    y = y + (x[i ^ (1 << stage)] - x[i],)
                else:
                    y = y + (x[i] + x[i ^ (1 << stage)],)
            x = y
    lanes = tl.arange(0, x[0].shape[1])[None, :] + tl.zeros_like(x[0]).to(tl.int32)
    for stage in tl.static_range(8):
        if (1 << stage) < x[0].shape[1]:
            y = ()
            for i in tl.static_range(CHANNELS):
                other = tl.gather(x[i], lanes ^ (1 << stage), 1)
                y = y + (tl.where((lanes & (1 << stage)) > 0, other - x[i], x[i] + other),)
            x = y
    return x


@triton.jit
def _first_scale(y, HALF: tl.constexpr, UNIT_STEP: tl.constexpr, HEAD_DIM: tl.constexpr, CHANNELS: tl.constexpr):
    reach = largest_magnitude(y, CHANNELS).to(tl.float32, bitcast=True) * (1.0 / HALF)
    reach = tl.where(reach < _LEAST_REACH, 0.0, reach)
    top = reach * HALF
    inverse = inverse_of(top)
    total = tl.zeros_like(y[0]).to(tl.int32)
    for i in tl.static_range(CHANNELS):
        share = y[i] * inverse
        total += (share * share * _SQUARE_ONE).to(tl.int32)
    mean = row_sum(total).to(tl.float32) * (1.0 / (HEAD_DIM * _SQUARE_ONE))
    return tl.minimum(reach, 0.5 * (tl.sqrt_rn(mean) * top * UNIT_STEP + reach))


@triton.jit
def _level(y, inverse, HALF: tl.constexpr):
    return tl.minimum(tl.maximum(tl.floor(y * inverse), -HALF), HALF - 1.0)


@triton.jit
def _fitted_bits(y, scale, HALF: tl.constexpr, CHANNELS: tl.constexpr):
    """float16 bits of the scale with the least squared error for the codes that ``scale`` gives."""
    inverse = inverse_of(scale)
    product = tl.zeros_like(y[0]).to(tl.int32)
    square = tl.zeros_like(product)
    for i in tl.static_range(CHANNELS):
        odd = 2.0 * _level(y[i], inverse, HALF) + 1.0
        product += (y[i] * inverse * odd * _PRODUCT_ONE).to(tl.int32)
        square += odd.to(tl.int32) * odd.to(tl.int32)
    share = tl.div_rn(row_sum(product).to(tl.float32), row_sum(square).to(tl.float32))
    return half_bits(tl.minimum(scale * share * (2.0 / _PRODUCT_ONE), _LARGEST_SCALE))


@triton.jit
def _store_codes(row, codes, group, LAYOUT: tl.constexpr):
    """Store eight neighbouring codes of a lane, the ``group``-th eight of its row."""
    if LAYOUT.bits == 4:
        word = codes[7]
        for i in tl.static_range(6, -1, -1):
            word = (word << 4) | codes[i]
        tl.store(row.to(tl.pointer_type(tl.int32)) + group, word)
    else:
        low = codes[7] & 3
        high = codes[7] >> 2
        for i in tl.static_range(6, -1, -1):
            low = (low << 2) | (codes[i] & 3)
            high = (high << 1) | (codes[i] >> 2)
        tl.store(row.to(tl.pointer_type(tl.int16)) + group, low.to(tl.int16))
        tl.store(row + LAYOUT.high_byte + group, high.to(tl.uint8))


@triton.jit
def _store_integers(
    v_ptr,
    v_scale,
    row,
    SCALED: tl.constexpr,
    LAYOUT: tl.constexpr,
    FORWARD: tl.constexpr,
    UNIT_STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Pack the values at ``v_ptr`` into the bytes at ``row``, columns of pointers."""
    HALF: tl.constexpr = 8.0 if LAYOUT.bits == 4 else 4.0
    lanes = tl.arange(0, LAYOUT.head_dim // CHANNELS)[None, :]
    v = load_channels(v_ptr + CHANNELS * lanes, CHANNELS)
    if SCALED:
        scaled = ()
        for i in tl.static_range(CHANNELS):
            scaled = scaled + (tl.div_rn(v[i], v_scale + tl.zeros_like(v[i])),)
        v = scaled
    is_number = largest_magnitude(v, CHANNELS) <= INFINITY
    limited = ()
    for i in tl.static_range(CHANNELS):
        limited = limited + (tl.where(is_number, tl.minimum(tl.maximum(v[i], -FLOAT16_MAX), FLOAT16_MAX), 0.0),)
    transformed = _transform(limited, CHANNELS)
    y = ()
    for i in tl.static_range(CHANNELS):
        y = y + (transformed[i] * FORWARD,)

    scale = _fitted_bits(y, _first_scale(y, HALF, UNIT_STEP, LAYOUT.head_dim, CHANNELS), HALF, CHANNELS)
    inverse = inverse_of(half_value(scale))
    for group in tl.static_range(CHANNELS // 8):
        codes = ()
        for i in tl.static_range(8):
            codes = codes + ((_level(y[8 * group + i], inverse, HALF) + HALF).to(tl.int32),)
        _store_codes(row, codes, CHANNELS // 8 * lanes + group, LAYOUT)
    bits = tl.where(is_number, scale, HALF_NAN).to(tl.int64) & 0xFFFF
    tl.store((row + 2 * LAYOUT.scale_half).to(tl.pointer_type(tl.int64)), bits)


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
    FORWARD: tl.constexpr,
    UNIT_STEP: tl.constexpr,
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
        row = values_ptr + rows * LAYOUT.row_bytes
        _store_integers(v_ptr, v_scale, row, SCALED, LAYOUT, FORWARD, UNIT_STEP, CHANNELS)


def written_values(rows: LayerRows, v: torch.Tensor, v_scale: float) -> tuple[torch.Tensor, dict[str, object]]:
    """Value rows as the write kernel takes them, and its compile-time arguments for them.

    float8 rows and rows of integers are bytes; the latter have a ``V_LAYOUT``. ``V_LIMIT`` is the magnitude at which
    channels saturate before they are converted, 0 for none.
    """
    made = rows.value_format
    arguments = {
        "V_HEAD_DIM": made.head_dim,
        "V_LAYOUT": IntegersLayout.of(made),
        "V_SCALED": v_scale != 1.0,
        "V_LIMIT": 0.0,
        "V_FORWARD": 0.0,
        "V_UNIT_STEP": 0.0,
    }
    if isinstance(made, Integers):
        of_integers = {"V_FORWARD": hadamard_scales(made.block)[0], "V_UNIT_STEP": UNIT_STEPS[made.bits]}
        return rows.values, arguments | of_integers
    is_float8 = made.dtype == torch.float8_e4m3fn
    if is_float8 or (made.dtype == torch.float16 and (v_scale != 1.0 or v.dtype != torch.float16)):
        arguments["V_LIMIT"] = torch.finfo(made.dtype).max
    return rows.values if is_float8 else rows.values.view(made.dtype), arguments
