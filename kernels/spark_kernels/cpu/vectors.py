"""Vectors of 16 float32 for numba.

LLVM's own vectoriser does well on element-wise loops, but not on expanding bit planes (five times slower) nor on
keeping several accumulators in registers. These few operations on an explicit vector type are plain LLVM IR: one
AVX-512 instruction each where there is AVX-512, and a few narrower ones elsewhere. Indices are not checked.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from spark_kernels.cpu.compile import kernel

LANES = 16
_VECTOR = ir.VectorType(ir.FloatType(), LANES)


class _Float32x16(types.Type):
    def __init__(self) -> None:
        super().__init__(name="float32x16")


float32x16 = _Float32x16()


@register_model(_Float32x16)
class _Float32x16Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, _VECTOR)


@kernel()
def empty_tile(rows, columns):
    """Uninitialised C-contiguous float32 ``[rows, columns]`` that starts at a cache line."""
    flat = np.empty(rows * columns + LANES, np.float32)
    skip = (-(flat.ctypes.data // 4)) % LANES
    return flat[skip : skip + rows * columns].reshape(rows, columns)


def _splat(builder, x):
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, x, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _pointer(context, builder, array_type, array, i, j):
    array = context.make_array(array_type)(context, builder, array)
    pointer = cgutils.get_item_pointer(context, builder, array_type, array, [i, j], wraparound=False)
    return builder.bitcast(pointer, _VECTOR.as_pointer())


@intrinsic
def load(typingctx, array, i, j):
    """``array[i, j : j + 16]`` of a C-contiguous 2-d float32 array."""

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(context, builder, signature.args[0], *args), align=4)

    return float32x16(array, types.intp, types.intp), codegen


@intrinsic
def store(typingctx, array, i, j, vector):
    """Set ``array[i, j : j + 16]``."""

    def codegen(context, builder, signature, args):
        builder.store(args[3], _pointer(context, builder, signature.args[0], *args[:3]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, float32x16), codegen


@intrinsic
def splat(typingctx, x):
    """16 times a float32."""

    def codegen(context, builder, signature, args):
        return _splat(builder, args[0])

    return float32x16(types.float32), codegen


@intrinsic
def add(typingctx, a, b):
    """``a + b``."""

    def codegen(context, builder, signature, args):
        return builder.fadd(*args)

    return float32x16(float32x16, float32x16), codegen


@intrinsic
def subtract(typingctx, a, b):
    """``a - b``."""

    def codegen(context, builder, signature, args):
        return builder.fsub(*args)

    return float32x16(float32x16, float32x16), codegen


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

    return float32x16(float32x16, float32x16, float32x16), codegen


@intrinsic
def signed(typingctx, bits, weight):
    """``weight`` where a bit of a uint16 is set and ``-weight`` where it is clear, lowest bit first."""

    def codegen(context, builder, signature, args):
        mask = builder.bitcast(args[0], ir.VectorType(ir.IntType(1), LANES))
        return builder.select(mask, _splat(builder, args[1]), _splat(builder, builder.fneg(args[1])))

    return float32x16(types.uint16, types.float32), codegen


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


@intrinsic
def prefetch(typingctx, array, i, j, k):
    """Ask for the cache line of ``array[i, j, k]``, a C-contiguous 3-d array, to be read soon."""

    def codegen(context, builder, signature, args):
        array_type = signature.args[0]
        array = context.make_array(array_type)(context, builder, args[0])
        pointer = cgutils.get_item_pointer(context, builder, array_type, array, args[1:], wraparound=False)
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        read, keep_in_all_caches, data = (ir.Constant(ir.IntType(32), n) for n in (0, 3, 1))
        function = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [pointer.type],
            ir.FunctionType(ir.VoidType(), [pointer.type] + 3 * [ir.IntType(32)]),
        )
        builder.call(function, [pointer, read, keep_in_all_caches, data])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, types.intp), codegen
