"""Rows shared out among lanes: what the write kernel's parts have in common.

A warp works on several rows side by side. Tensors are ``[rows, lanes]`` with one element per thread, and a thread has
CHANNELS neighbouring positions of its row (of a value: channels) as a tuple of such tensors. So most of what concerns a
whole row happens in registers of one thread, and what threads of a row have to tell each other they tell for all rows
of the warp at once.

Loops over channels call no other functions: Triton's interpreter takes half a millisecond for a call.
"""

from __future__ import annotations

import triton
import triton.language as tl

WARP = 32
# Threads of many channels take the fewest instructions per row, threads of few finish a row soonest.
MANY_CHANNELS = 16
FEW_CHANNELS = 8


@triton.jit
def load_channels(ptr, COUNT: tl.constexpr):
    """float32 numbers at ``ptr``, ``ptr + 1`` and so on, as a tuple; they begin at whole words of up to 8 bytes.

    int32 stays int32.
    """
    dtype: tl.constexpr = ptr.dtype.element_ty
    WIDTH: tl.constexpr = dtype.primitive_bitwidth
    bits_type: tl.constexpr = tl.int16 if WIDTH == 16 else tl.int32
    WORD: tl.constexpr = 64 if COUNT * WIDTH >= 64 else COUNT * WIDTH
    words = ptr.to(tl.pointer_type(tl.int64 if WORD == 64 else tl.int32))
    numbers = ()
    for i in tl.static_range(COUNT * WIDTH // WORD):
        word = tl.load(words + i)
        for shift in tl.static_range(0, WORD, WIDTH):
            if dtype == tl.int32:
                number = (word >> shift).to(tl.int32)
            elif dtype == tl.bfloat16:
                # The upper half of the float32; LLVM would shift it down and up again.
                half = (word >> (shift // 32 * 32)).to(tl.int32)
                number = (half << 16 if shift % 32 == 0 else half & -65536).to(tl.float32, bitcast=True)
            else:
                number = (word >> shift).to(bits_type).to(dtype, bitcast=True).to(tl.float32)
            numbers = numbers + (number,)
    return numbers


@triton.jit
def gather_channels(ptr, channels, COUNT: tl.constexpr):
    """float32 numbers at ``ptr`` plus each of a tuple of channels."""
    numbers = ()
    for i in tl.static_range(COUNT):
        numbers = numbers + (tl.load(ptr + channels[i]).to(tl.float32),)
    return numbers


@triton.jit
def count_bits(x):
    """Bits set in a uint32, as int32; in the steps by which LLVM knows that one instruction counts them."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def row_sum(x):
    """Sum of each row, as a column."""
    return tl.sum(x, 1)[:, None]


@triton.jit
def row_max(x):
    """Maximum of each row, as a column; NaN only where all are."""
    return tl.max(x, 1)[:, None]


@triton.jit
def sum_of_lanes_before(x):
    """Sum over the lanes of the same row before each lane."""
    return tl.cumsum(x, 1) - x
