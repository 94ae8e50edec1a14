"""Arithmetic on vectors of 16 float32 for numba; `spark_kernels.cpu.memory` loads and stores them.

LLVM's own vectoriser does well on element-wise loops, but not on keeping several accumulators in registers. These few
operations on an explicit vector type are plain LLVM IR: one AVX-512 instruction each where there is AVX-512, and a few
narrower ones elsewhere.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils, errors
from numba.extending import intrinsic

from spark_kernels.cpu.numbers import EXP2_TAYLOR
from spark_kernels.cpu.vector_types import LANES, VECTOR, VECTOR_OF, float32x4, float32x16, shuffled, splatted


@intrinsic
def splat4(typingctx, x):
    """4 times a float32."""

    def codegen(context, builder, signature, args):
        return splatted(builder, args[0], 4)

    return float32x4(types.float32), codegen


@intrinsic
def splat(typingctx, x):
    """16 times a float32."""

    def codegen(context, builder, signature, args):
        return splatted(builder, args[0])

    return float32x16(types.float32), codegen


@intrinsic
def add(typingctx, a, b):
    """``a + b``."""

    def codegen(context, builder, signature, args):
        return builder.fadd(*args)

    return a(a, b), codegen


@intrinsic
def multiply(typingctx, a, b):
    """``a * b``."""

    def codegen(context, builder, signature, args):
        return builder.fmul(*args)

    return a(a, b), codegen


@intrinsic
def subtract(typingctx, a, b):
    """``a - b``."""

    def codegen(context, builder, signature, args):
        return builder.fsub(*args)

    return a(a, b), codegen


@intrinsic
def at_least(typingctx, a, b):
    """uint16 with a bit for each lane, lowest first: whether ``a >= b``."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fcmp_ordered(">=", *args), ir.IntType(LANES))

    return types.uint16(float32x16, float32x16), codegen


@intrinsic
def count(typingctx, bits):
    """Number of bits set in a uint16."""

    def codegen(context, builder, signature, args):
        return builder.zext(builder.ctpop(args[0]), ir.IntType(64))

    return types.int64(types.uint16), codegen


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@intrinsic
def larger(typingctx, a, b):
    """The larger number of each lane; either if one is NaN."""

    def codegen(context, builder, signature, args):
        return _larger(builder, *args)

    return float32x16(float32x16, float32x16), codegen


@intrinsic
def multiply_add(typingctx, a, b, c):
    """``a * b + c``, rounded once where the CPU can."""

    def codegen(context, builder, signature, args):
        product = builder.fmul(args[0], args[1], flags=("contract",))
        return builder.fadd(product, args[2], flags=("contract",))

    return a(a, b, c), codegen


@intrinsic
def butterfly(typingctx, vector, width):
    """One stage of a Hadamard transform of 16 channels: sums and differences of lanes ``width`` (a constant) apart."""
    if not isinstance(width, types.IntegerLiteral):
        raise errors.RequireLiteralValue("width must be a constant")
    apart = width.literal_value

    def codegen(context, builder, signature, args):
        other = shuffled(builder, args[0], args[0], [lane ^ apart for lane in range(LANES)])
        is_second = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [bool(lane & apart) for lane in range(LANES)])
        return builder.select(is_second, builder.fsub(other, args[0]), builder.fadd(args[0], other))

    return float32x16(float32x16, width), codegen


@intrinsic
def totals(typingctx, a, b, c, d):
    """The sums of four vectors' numbers. Together they take 13 operations, where each alone takes 8."""

    def codegen(context, builder, signature, args):
        def interleaved(x, y, width):
            # Within every 4 lanes, as the CPU's unpack instructions: the first halves of x and y, then the second.
            first = [base + lane for base in range(0, LANES, 4) for lane in _alternate(0, LANES, width)]
            second = [base + lane for base in range(0, LANES, 4) for lane in _alternate(2, LANES + 2, width)]
            return builder.fadd(shuffled(builder, x, y, first), shuffled(builder, x, y, second))

        a, b, c, d = args
        sums = interleaved(interleaved(a, b, 1), interleaved(c, d, 1), 2)
        lanes = LANES
        while lanes > 4:
            lanes //= 2
            low = shuffled(builder, sums, sums, list(range(lanes)))
            sums = builder.fadd(low, shuffled(builder, sums, sums, list(range(lanes, 2 * lanes))))
        return sums

    return float32x4(float32x16, float32x16, float32x16, float32x16), codegen


def _alternate(x, y, width):
    """Two lanes from ``x`` and two from ``y``, taking turns after ``width`` of them."""
    return [x, y, x + 1, y + 1] if width == 1 else [x, x + 1, y, y + 1]


def _by_column(builder, vector, combine):
    """Lanes 0, 4, 8 and 12 combined, and likewise 1, 2 and 3; every lane gets its column's result."""
    for step in (8, 4):
        turned = shuffled(builder, vector, vector, [(lane + step) % LANES for lane in range(LANES)])
        vector = combine(vector, turned)
    return vector


@intrinsic
def first_four(typingctx, vector):
    """Lanes 0 to 3."""

    def codegen(context, builder, signature, args):
        return shuffled(builder, args[0], args[0], list(range(4)))

    return float32x4(float32x16), codegen


@intrinsic
def column_totals(typingctx, vector):
    """In each lane the sum of the four lanes that are as far from a multiple of 4."""

    def codegen(context, builder, signature, args):
        return _by_column(builder, args[0], builder.fadd)

    return float32x16(float32x16), codegen


@intrinsic
def column_largest(typingctx, vector):
    """In each lane the largest of the four lanes that are as far from a multiple of 4; any of them if one is NaN."""

    def codegen(context, builder, signature, args):
        return _by_column(builder, args[0], lambda a, b: _larger(builder, a, b))

    return float32x16(float32x16), codegen


@intrinsic
def exp2_nonpositive(typingctx, vector):
    """``2**x`` for x <= 0 to float32 accuracy; below -126 it stays at ``2**-126``. NaN gives NaN."""

    def codegen(context, builder, signature, args):
        def constant(x):
            return ir.Constant(VECTOR, [float(x)] * LANES)

        x = builder.select(builder.fcmp_ordered("<", args[0], constant(-126)), constant(-126), args[0])
        nearest = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(VECTOR, [VECTOR]), f"llvm.nearbyint.v{LANES}f32"
        )
        whole = builder.call(nearest, [x])
        fraction = builder.fsub(x, whole)
        series = constant(EXP2_TAYLOR[-1])
        for factor in reversed(EXP2_TAYLOR[:-1]):
            product = builder.fmul(series, fraction, flags=("contract",))
            series = builder.fadd(product, constant(factor), flags=("contract",))
        exponent = builder.add(builder.fptosi(whole, VECTOR_OF[32]), ir.Constant(VECTOR_OF[32], [127] * LANES))
        power = builder.bitcast(builder.shl(exponent, ir.Constant(VECTOR_OF[32], [23] * LANES)), VECTOR)
        return builder.fmul(series, power)

    return float32x16(float32x16), codegen


def _reduced(builder, vector, combine):
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(vector.type, ir.Undefined)
        index = ir.VectorType(ir.IntType(32), lanes)
        low = builder.shuffle_vector(vector, undefined, ir.Constant(index, list(range(lanes))))
        high = builder.shuffle_vector(vector, undefined, ir.Constant(index, list(range(lanes, 2 * lanes))))
        vector = combine(low, high)
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


@intrinsic
def total(typingctx, vector):
    """Sum of the 16 numbers, by halves."""

    def codegen(context, builder, signature, args):
        return _reduced(builder, args[0], builder.fadd)

    return types.float32(float32x16), codegen


@intrinsic
def largest(typingctx, vector):
    """Largest of the 16 numbers; any of them if one is NaN."""

    def codegen(context, builder, signature, args):
        return _reduced(builder, args[0], lambda a, b: _larger(builder, a, b))

    return types.float32(float32x16), codegen
