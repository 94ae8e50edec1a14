"""Ways of storing a cache, one to a file: ours, and what else there is."""

from eval.methods.authors import Authors
from eval.methods.base import Method
from eval.methods.fp8 import Fp8
from eval.methods.integers import Integers
from eval.methods.snapkv import SnapKV
from eval.methods.spark import recipes
from eval.methods.think import ThinK

RIVALS: tuple[Method, ...] = (
    Fp8(),
    Integers(8, 256),
    Integers(4, 32),
    Integers(4, 128),
    Integers(4, 256, rotated=True),
    Integers(3, 256, rotated=True),
    ThinK(0.5),
    Authors(0.8),
    SnapKV(0.25),
)

__all__ = ["RIVALS", "Method", "recipes"]
