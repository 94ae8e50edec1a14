"""Loads and stores of vectors for numba, with conversions on the way. Indices are neither checked nor negative."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spark_kernels.cpu.compile import kernel
from spark_kernels.cpu.vector_types import LANES, VECTOR, VECTOR_OF, float32x4, float32x16, splatted


@kernel()
def empty_tile(rows, columns):
    """Uninitialised C-contiguous float32 ``[rows, columns]`` that starts at a cache line."""
    flat = np.empty(rows * columns + LANES, np.float32)
    skip = (-(flat.ctypes.data // 4)) % LANES
    return flat[skip : skip + rows * columns].reshape(rows, columns)


def _pointer(context, builder, array_type, array, indices, pointee):
    array = context.make_array(array_type)(context, builder, array)
    pointer = cgutils.get_item_pointer(context, builder, array_type, array, list(indices), wraparound=False)
    return builder.bitcast(pointer, pointee.as_pointer())


def _element(context, builder, signature, args):
    array_type = signature.args[0]
    array = context.make_array(array_type)(context, builder, args[0])
    pointer = cgutils.get_item_pointer(context, builder, array_type, array, list(args[1:]), wraparound=False)
    return builder.load(pointer)


@intrinsic
def at(typingctx, array, i):
    """``array[i]`` of a 1-d array; ``i`` is not negative, and numba's check for that is spared."""
    return array.dtype(array, types.intp), _element


@intrinsic
def at3(typingctx, array, i, j, k):
    """``array[i, j, k]``, as `at`."""
    return array.dtype(array, types.intp, types.intp, types.intp), _element


@intrinsic
def load(typingctx, array, i, j):
    """``array[i, j : j + 16]`` of a C-contiguous 2-d float32 array."""

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(context, builder, signature.args[0], args[0], args[1:], VECTOR), align=4)

    return float32x16(array, types.intp, types.intp), codegen


@intrinsic
def load4(typingctx, array, i):
    """``array[i : i + 4]`` of a 1-d float32 array."""

    def codegen(context, builder, signature, args):
        four = ir.VectorType(ir.FloatType(), 4)
        return builder.load(_pointer(context, builder, signature.args[0], args[0], args[1:], four), align=4)

    return float32x4(array, types.intp), codegen


@intrinsic
def store(typingctx, array, i, j, vector):
    """Set ``array[i, j : j + lanes]`` of a C-contiguous 2-d float32 array."""

    def codegen(context, builder, signature, args):
        pointee = args[3].type
        builder.store(args[3], _pointer(context, builder, signature.args[0], args[0], args[1:3], pointee), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, vector), codegen


@intrinsic
def store1(typingctx, array, i, vector):
    """Set ``array[i : i + lanes]`` of a 1-d float32 array."""

    def codegen(context, builder, signature, args):
        pointee = args[2].type
        builder.store(args[2], _pointer(context, builder, signature.args[0], args[0], args[1:2], pointee), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


@intrinsic
def load_bfloat16(typingctx, array, i, j, k):
    """``array[i, j, k : k + 16]`` of a C-contiguous 3-d uint16 array of bfloat16, as float32."""

    def codegen(context, builder, signature, args):
        bits = VECTOR_OF[16]
        halves = builder.load(_pointer(context, builder, signature.args[0], args[0], args[1:], bits), align=2)
        wide = builder.zext(halves, VECTOR_OF[32])
        return builder.bitcast(builder.shl(wide, ir.Constant(VECTOR_OF[32], [16] * LANES)), VECTOR)

    return float32x16(array, types.intp, types.intp, types.intp), codegen


@intrinsic
def load_float16(typingctx, array, i, j, k):
    """``array[i, j, k : k + 16]`` of a C-contiguous 3-d uint16 array of float16, as float32."""

    def codegen(context, builder, signature, args):
        halves = ir.VectorType(ir.HalfType(), LANES)
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1:], halves)
        return builder.fpext(builder.load(pointer, align=2), VECTOR)

    return float32x16(array, types.intp, types.intp, types.intp), codegen


@intrinsic
def load_float8(typingctx, array, i, j, k):
    """``array[i, j, k : k + 16]`` of a C-contiguous 3-d uint8 array of float8_e4m3fn, as float32.

    Shifted by 7 bits such a number is a float16 of 1/256 its value, subnormals included; 0x7f is NaN.
    """

    def codegen(context, builder, signature, args):
        def constant(bits):
            return ir.Constant(VECTOR_OF[16], [bits] * LANES)

        pointer = _pointer(context, builder, signature.args[0], args[0], args[1:], VECTOR_OF[8])
        wide = builder.zext(builder.load(pointer, align=1), VECTOR_OF[16])
        magnitude = builder.and_(wide, constant(0x7F))
        is_nan = builder.icmp_unsigned("==", magnitude, constant(0x7F))
        half = builder.select(is_nan, constant(0x7E00), builder.shl(magnitude, constant(7)))
        half = builder.or_(half, builder.shl(builder.and_(wide, constant(0x80)), constant(8)))
        number = builder.fpext(builder.bitcast(half, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
        return builder.fmul(number, ir.Constant(VECTOR, [256.0] * LANES))

    return float32x16(array, types.intp, types.intp, types.intp), codegen


@intrinsic
def load_codes(typingctx, array, i, j, k, shift, bits):
    """Bits ``shift .. shift + bits - 1`` of the 16 bytes at ``array[i, j, k : k + 16]``, uint8 and 3-d, as float32."""

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, signature.args[0], args[0], args[1:4], VECTOR_OF[8])
        wide = builder.zext(builder.load(pointer, align=1), VECTOR_OF[32])
        one = ir.Constant(ir.IntType(32), 1)
        mask = builder.sub(builder.shl(one, args[5]), one)
        shift, mask = (_splatted_bits(builder, bits) for bits in (args[4], mask))
        return builder.sitofp(builder.and_(builder.lshr(wide, shift), mask), VECTOR)

    return float32x16(array, types.intp, types.intp, types.intp, types.int32, types.int32), codegen


@intrinsic
def load_low_bits(typingctx, array, i, j, k, bits):
    """The lowest ``bits`` bits of the words ``array[i, j, k : k + 16]``, uint16 and 3-d, as float32."""

    def codegen(context, builder, signature, args):
        words = builder.load(_pointer(context, builder, signature.args[0], args[0], args[1:4], VECTOR_OF[16]), align=2)
        one = ir.Constant(ir.IntType(32), 1)
        mask = _splatted_bits(builder, builder.sub(builder.shl(one, args[4]), one))
        return builder.sitofp(builder.and_(builder.zext(words, VECTOR_OF[32]), mask), VECTOR)

    return float32x16(array, types.intp, types.intp, types.intp, types.int32), codegen


@intrinsic
def store_high_bits(typingctx, target, at, array, i, j, k, bits):
    """Set ``target[at : at + 16]`` to 4 times what is above the lowest ``bits`` bits of ``array[i, j, k : k + 16]``.

    Both are uint16, ``array`` is 3-d.
    """

    def codegen(context, builder, signature, args):
        target, at, array, i, j, k, bits = args
        words = builder.load(_pointer(context, builder, signature.args[2], array, [i, j, k], VECTOR_OF[16]), align=2)
        wide = builder.lshr(builder.zext(words, VECTOR_OF[32]), _splatted_bits(builder, bits))
        places = builder.trunc(builder.shl(wide, ir.Constant(VECTOR_OF[32], [2] * LANES)), VECTOR_OF[16])
        builder.store(places, _pointer(context, builder, signature.args[0], target, [at], VECTOR_OF[16]), align=2)
        return context.get_dummy_value()

    return types.void(target, types.intp, array, types.intp, types.intp, types.intp, types.int32), codegen


def _splatted_bits(builder, bits):
    """16 times an int32."""
    return builder.bitcast(splatted(builder, builder.bitcast(bits, ir.FloatType())), VECTOR_OF[32])


@intrinsic
def load_float32(typingctx, array, i, j, k):
    """``array[i, j, k : k + 16]`` of a C-contiguous 3-d float32 array."""

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(context, builder, signature.args[0], args[0], args[1:], VECTOR), align=4)

    return float32x16(array, types.intp, types.intp, types.intp), codegen


@intrinsic
def prefetch(typingctx, array, i, j, k):
    """Ask for the cache line of ``array[i, j, k]``, a C-contiguous 3-d array, to be in the L2 cache soon."""

    def codegen(context, builder, signature, args):
        array_type = signature.args[0]
        array = context.make_array(array_type)(context, builder, args[0])
        pointer = cgutils.get_item_pointer(context, builder, array_type, array, args[1:], wraparound=False)
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        read, keep_in_l2, data = (ir.Constant(ir.IntType(32), n) for n in (0, 2, 1))
        function = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [pointer.type],
            ir.FunctionType(ir.VoidType(), [pointer.type] + 3 * [ir.IntType(32)]),
        )
        builder.call(function, [pointer, read, keep_in_l2, data])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, types.intp), codegen
