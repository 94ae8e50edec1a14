"""How functions here are compiled."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numba

_HERE = Path(__file__).parent
_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.py")))).hexdigest()[:16]


def kernel(**options: object) -> Callable[[Callable], Callable]:
    """Decorate a function with ``numba.njit(cache=True, nogil=True, **options)``.

    numba takes a compiled function from its cache on disk as long as the file of that function is unchanged, even if
    a function it calls, in another file, has changed. So each state of this directory gets a cache of its own, in
    ``NUMBA_CACHE_DIR`` or beside the sources.
    """

    def decorate(function: Callable) -> Callable:
        outer = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = os.path.join(outer or _HERE / "__pycache__", f"spark_kernels-{_SOURCES}")
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        finally:
            numba.config.CACHE_DIR = outer

    return decorate
