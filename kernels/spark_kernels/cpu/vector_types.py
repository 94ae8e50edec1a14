"""Types of short float32 vectors for numba, and what functions on them are built from."""

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

LANES = 16
VECTOR = ir.VectorType(ir.FloatType(), LANES)
VECTOR_OF = {bits: ir.VectorType(ir.IntType(bits), LANES) for bits in (8, 16, 32)}


class _Vector(types.Type):
    """float32 lanes."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(name=f"float32x{lanes}")


float32x16, float32x4 = _Vector(16), _Vector(4)


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(ir.FloatType(), fe_type.lanes))


def splatted(builder, x, lanes=LANES):
    undefined = ir.Constant(ir.VectorType(ir.FloatType(), lanes), ir.Undefined)
    first = builder.insert_element(undefined, x, ir.Constant(ir.IntType(32), 0))
    return shuffled(builder, first, undefined, [0] * lanes)


def shuffled(builder, a, b, lanes):
    index = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(a, b, index)
