"""Number formats numba lacks on the CPU, and an exponential that vectorises.

Everything here is inlined into loops that LLVM vectorises, so there are no branches and no library calls. float16
needs conversion instructions: F16C on x86-64 (any CPU since about 2013), part of the base on aarch64.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Sums may be reordered, multiplications fused and divisions by constants turned into products; NaN and infinity keep
# their meaning.
FAST_SUMS = {"reassoc", "contract", "arcp", "nsz"}

LN2 = np.float32(math.log(2.0))
LOG2_E = 1.0 / math.log(2.0)
EXP2_TAYLOR = tuple(np.float32(math.log(2.0) ** n / math.factorial(n)) for n in range(8))
_SMALLEST_EXPONENT = np.float32(-126.0)


@intrinsic
def half_to_float(typingctx, bits):
    """float32 value of a float16 given as uint16."""

    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def float_to_half(typingctx, x):
    """uint16 bits of the float16 nearest to a float32, ties to even."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def bits_to_float(typingctx, bits):
    """float32 with the given uint32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@njit(inline="always")
def exp2_nonpositive(x):
    """2**x for float32 x <= 0 to float32 accuracy; below -126 it stays at 2**-126. NaN gives NaN."""
    if x < _SMALLEST_EXPONENT:
        x = _SMALLEST_EXPONENT
    whole = np.floor(x + np.float32(0.5))
    f = x - whole
    series = EXP2_TAYLOR[7]
    series = series * f + EXP2_TAYLOR[6]
    series = series * f + EXP2_TAYLOR[5]
    series = series * f + EXP2_TAYLOR[4]
    series = series * f + EXP2_TAYLOR[3]
    series = series * f + EXP2_TAYLOR[2]
    series = series * f + EXP2_TAYLOR[1]
    series = series * f + EXP2_TAYLOR[0]
    return series * bits_to_float(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))
