"""Arithmetic that translated blocks call, on arrays ``[CTAs, warps, lanes]``.

What the device rounds in its own way is approximate here: ex2, lg2, rcp and tanh are NumPy's, and a tensor-core product
sums in float64 and rounds once, where the device truncates along the way.
"""

from __future__ import annotations

import numpy as np

LANES = np.arange(32)
_NAN = np.uint32(0x7FFFFFFF).view("f4")
where = np.where


def both(m, p):
    return p if m is None else m & p


def keep(R, register, value, m):
    """Set a register under the mask of the threads that are active."""
    R[register] = value if m is None else np.where(m, value, R[register])


def uniform(value):
    return np.full((1, 1, 1), value)


def canonical_nan(x):
    """NaN as the device writes it."""
    nan = x != x
    return np.where(nan, _NAN, x) if nan.any() else x


def flushed(x):
    """Subnormal numbers as zeros."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def fma(a, b, c, dtype):
    return (np.multiply(a, b, dtype="f8") + c).astype(dtype)


def fma_bf16x2(a, b, c):
    a, b, c = ((np.ascontiguousarray(x)[..., None].view("u2").astype("u4") << 16).view("f4") for x in (a, b, c))
    return unpaired(bf16_bits(fma(a, b, c, "f4")))


def _signed_zeros(a, b, result, of_bits):
    equal = a == b
    if equal.any():
        bits = of_bits(*(np.asarray(x).view(f"u{x.dtype.itemsize}") for x in (a, b)))
        result = np.where(equal, bits.view(result.dtype), result)
    return result


def fmax(a, b):
    return _signed_zeros(a, b, np.fmax(a, b), np.bitwise_and)


def fmin(a, b):
    return _signed_zeros(a, b, np.fmin(a, b), np.bitwise_or)


def quotient(a, b):
    """Integer division towards zero."""
    q = np.abs(a) // np.where(b == 0, 1, np.abs(b))
    return np.where((a < 0) != (b < 0), -q, q).astype(a.dtype)


def shift(x, by, bits, symbol):
    inside, amount = by < bits, np.minimum(by, bits - 1).astype(x.dtype)
    if symbol == "<<":
        return np.where(inside, x << amount, x.dtype.type(0))
    return x >> amount if x.dtype.kind == "i" else np.where(inside, x >> amount, x.dtype.type(0))


def permuted(a, b, selector):
    """prmt: each byte of the result is one of the eight of ``a`` and ``b``, or that one's sign eight times."""
    if isinstance(selector, int):
        chosen = [(selector >> (4 * k)) & 15 for k in range(4)]
        each = [(((a, b)[n >> 2 & 1] >> np.uint32(8 * (n & 3))) & np.uint32(255), n >= 8) for n in chosen]
    else:
        both_words = a.astype("u8") | (b.astype("u8") << np.uint64(32))
        chosen = [(selector >> np.uint32(4 * k)) & np.uint32(15) for k in range(4)]
        each = [((both_words >> (n & 7).astype("u8") * np.uint64(8)) & np.uint64(255), n >= 8) for n in chosen]
    result = np.uint32(0)
    for k, (byte, sign) in enumerate(each):
        byte = np.where(sign, np.where(byte & 128, 255, 0), byte) if np.any(sign) else byte
        result = result | (byte.astype("u4") << np.uint32(8 * k))
    return result


def lop3(a, b, c, table):
    """Any function of three bits, given by its table of truth."""
    result = np.uint32(0)
    for row in range(8):
        if table >> row & 1:
            given = (word if row >> (2 - k) & 1 else ~word for k, word in enumerate((a, b, c)))
            result = result | np.bitwise_and(np.bitwise_and(next(given), next(given)), next(given))
    return result


def dot_bytes(a, b, c, a_type, b_type):
    a, b = (
        np.ascontiguousarray(x)[..., None].view(f"{t[0].replace('s', 'i')}1") for x, t in ((a, a_type), (b, b_type))
    )
    return (a.astype("i4") * b.astype("i4")).sum(-1, dtype="i4") + np.asarray(c).view("i4")


def f16_bits(x):
    return np.where(x == x, x.astype("f2").view("u2"), np.uint16(0x7FFF))


def bf16_bits(x):
    bits = np.asarray(x).view("u4")
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(x == x, rounded, np.uint32(0x7FFF)).astype("u2")


def of_bf16(bits):
    return (bits.astype("u4") << np.uint32(16)).view("f4")


def f16x2_bits(high, low):
    return (f16_bits(high).astype("u4") << np.uint32(16)) | f16_bits(low)


def bf16x2_bits(high, low):
    return (bf16_bits(high).astype("u4") << np.uint32(16)) | bf16_bits(low)


def halves_of_float8(x):
    """Two float8_e4m3fn to two float16."""
    bits = np.ascontiguousarray(x)[..., None].view("u1").astype("u2")
    half = ((bits & 0x7F) << 7).view("f2") * np.float16(256)
    half = np.where(bits & 0x7F == 0x7F, np.uint16(0x7FFF), half.view("u2") | (bits & 0x80) << 8)
    return unpaired(half.astype("u2"))


def _float8(x):
    """float8_e4m3fn of float32, saturated."""
    magnitude = np.minimum(np.abs(x), np.float32(448))
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, -6)
    steps = np.rint(np.ldexp(magnitude.astype("f8"), 3 - exponent)).astype("i4")
    bits = np.where(magnitude == 0, 0, ((exponent + 6) << 3) + steps)
    return np.where(x == x, bits | (np.signbit(x).astype("i4") << 7), 0x7F).astype("u2")


def float8_of_floats(high, low):
    return (_float8(high) << np.uint16(8)) | _float8(low)


def truncated(x):
    """float to int32, towards zero, saturated; NaN is 0."""
    x = np.where(x == x, x, 0)
    return np.clip(np.trunc(x.astype("f8")), -(2.0**31), 2.0**31 - 1).astype("i4")


def pairs(x):
    """Two float16 of each 32 bits, on a new axis."""
    return np.ascontiguousarray(x)[..., None].view("f2")


def unpaired(x):
    return np.ascontiguousarray(x).view("u4")[..., 0]


# Between the lanes of a warp


def shuffle(x, by, mode):
    """shfl; a lane that asks for one outside the warp keeps its own value."""
    if x.shape[-1] == 1:
        return x
    by = by if isinstance(by, int) else by.astype("i8")
    source = {"bfly": LANES ^ by, "up": LANES - by, "down": LANES + by, "idx": LANES * 0 + (by & 31)}[mode]
    source = np.where((source < 0) | (source > 31), LANES, source)
    if source.ndim == 1:
        return x[..., source]
    shape = np.broadcast_shapes(x.shape, source.shape)
    return np.take_along_axis(np.broadcast_to(x, shape), np.broadcast_to(source, shape), -1)


def reduce_lanes(x, function):
    x = np.broadcast_to(x, (*x.shape[:2], 32))
    return function.reduce(x, -1, dtype=x.dtype, keepdims=True)


def transposed_matrix(x):
    """movmatrix.trans of 8 x 8 numbers of 16 bits: lane ``l`` holds numbers 2 (l % 4) and the next of row l // 4."""
    x = np.ascontiguousarray(np.broadcast_to(x, (*x.shape[:2], 32)))
    rows = x.view("u2").reshape(*x.shape[:2], 8, 8)
    return np.ascontiguousarray(rows.swapaxes(-1, -2)).view("u4").reshape(x.shape)


def _fragments(words, dtype):
    """Numbers ``[CTAs, warps, register, group, thread, pair]`` of the registers of a matrix."""
    shape = (*np.broadcast_shapes(*(r.shape for r in words))[:2], 32)
    stacked = np.stack([np.broadcast_to(r, shape) for r in words], 2)
    halves = stacked.view("u2").reshape(*shape[:2], len(words), 8, 4, 2)
    return of_bf16(halves) if dtype == "bf16" else halves.view("f2").astype("f4")


def mma(a, b, c, dtype):
    """m16n8k16, by the layouts of PTX ISA 9.7.14.5.8."""
    a, b = _fragments(a, dtype), _fragments(b, dtype)
    # a: row = group + 8 * (register & 1), k = 2 * thread + pair + 8 * (register >> 1)
    a = a.reshape(*a.shape[:2], 2, 2, 8, 4, 2).transpose(0, 1, 3, 4, 2, 5, 6).reshape(*a.shape[:2], 16, 16)
    # b: k = 2 * thread + pair + 8 * register, column = group
    b = b.transpose(0, 1, 2, 4, 5, 3).reshape(*b.shape[:2], 16, 8)
    product = np.matmul(a.astype("f8"), b.astype("f8"))
    # c: row = group + 8 * (register >> 1), column = 2 * thread + (register & 1)
    product = product.reshape(*product.shape[:2], 2, 8, 4, 2).transpose(2, 5, 0, 1, 3, 4)
    product = product.reshape(2, 2, *product.shape[2:4], 32)
    return [canonical_nan((product[r >> 1, r & 1] + c[r]).astype("f4")) for r in range(4)]
