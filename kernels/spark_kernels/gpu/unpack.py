"""Planes of rows to tiles of float16: what the decode kernel multiplies.

Put under the exponent of 1024, a code is the mantissa of a float16, so that a mask and a subtraction convert it;
converting integers takes several times as long.
"""

from __future__ import annotations

import triton
import triton.language as tl

# float16 bits of 1024, whose mantissa counts ones.
_BITS_OF_1024 = tl.constexpr(0x6400)


@triton.jit
def interleave(a, b):
    """``[n, 2 * m]`` with ``a`` in the even and ``b`` in the odd columns."""
    return tl.join(a, b).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def _number(code):
    """float16 of an integer below 1024."""
    return (code | _BITS_OF_1024).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def load_plane(row, live, FIRST: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, BYTES: tl.constexpr):
    """Codes of a plane of ``COUNT`` channels from byte ``FIRST`` of the rows at ``row`` on, float16 ``[n, m]``.

    ``BYTES`` is a power of two, so m may exceed ``COUNT``; the columns beyond hold 0.
    """
    byte = tl.arange(0, BYTES)[None, :]
    mask = live[:, None] & (byte < COUNT * BITS // 8)
    packed = tl.load(row[:, None] + FIRST + byte, mask=mask, other=0).to(tl.int16)
    if BITS == 4:
        return interleave(_number(packed & 15), _number(packed >> 4))
    elif BITS == 2:
        even = interleave(_number(packed & 3), _number(packed >> 4 & 3))
        return interleave(even, interleave(_number(packed >> 2 & 3), _number(packed >> 6)))
    else:
        even = interleave(_number(packed & 1), _number(packed >> 4 & 1))
        even = interleave(even, interleave(_number(packed >> 2 & 1), _number(packed >> 6 & 1)))
        odd = interleave(_number(packed >> 1 & 1), _number(packed >> 5 & 1))
        odd = interleave(odd, interleave(_number(packed >> 3 & 1), _number(packed >> 7)))
        return interleave(even, odd)


@triton.jit
def _with_high_bit(low, high, f: tl.constexpr, odd):
    return _number((low >> (2 * f) & 3) | (high >> (4 * odd + f) & 1) << 2)


@triton.jit
def load_integers(row, live, LAYOUT: tl.constexpr):
    """Transformed values of the rows at ``row``, float16 ``[n, head_dim]``; 0 if not live."""
    scale = tl.load(row.to(tl.pointer_type(tl.float16)) + LAYOUT.scale_half, mask=live, other=0.0)[:, None]
    if LAYOUT.bits == 4:
        byte = tl.arange(0, LAYOUT.head_dim // 2)[None, :]
        packed = tl.load(row[:, None] + byte, mask=live[:, None], other=0).to(tl.int16)
        return (interleave(_number(packed & 15), _number(packed >> 4)) - 7.5) * scale
    else:
        byte = tl.arange(0, LAYOUT.head_dim // 4)[None, :]
        low = tl.load(row[:, None] + byte, mask=live[:, None], other=0).to(tl.int16)
        high = tl.load(row[:, None] + LAYOUT.high_byte + byte // 2, mask=live[:, None], other=0).to(tl.int16)
        odd = (byte & 1).to(tl.int16)
        even = interleave(_with_high_bit(low, high, 0, odd), _with_high_bit(low, high, 2, odd))
        odds = interleave(_with_high_bit(low, high, 1, odd), _with_high_bit(low, high, 3, odd))
        return (interleave(even, odds) - 3.5) * scale
