"""How functions here are compiled."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numba

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.py")))).hexdigest()[:16]


def kernel(**options: object) -> Callable[[Callable], Callable]:
    """Decorate a function with ``numba.njit(nogil=True, **options)``, kept on disk where some place is writable.

    numba takes a compiled function from its cache on disk as long as the file of that function is unchanged, even if
    a function it calls, in another file, has changed. So each state of this directory gets a cache of its own.
    """

    def decorate(function: Callable) -> Callable:
        directory = cache_directory()
        outer = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = directory or outer
        try:
            return numba.njit(cache=directory is not None, nogil=True, **options)(function)
        finally:
            numba.config.CACHE_DIR = outer

    return decorate


@functools.cache
def cache_directory() -> str | None:
    """Where compiled kernels are kept: in ``NUMBA_CACHE_DIR``, beside the sources or in the user's cache directory.

    The first that is writable; None, after a warning, if none is.
    """
    places = [_HERE / "__pycache__", Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())]
    if numba.config.CACHE_DIR:
        places.insert(0, Path(numba.config.CACHE_DIR))
    for place in places:
        directory = place / f"spark_kernels-{_SOURCES}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                return str(directory)
        except (OSError, RuntimeError):
            continue
    logger.warning(
        "SparK's CPU kernels are compiled anew at every start, which takes a minute: no directory is writable to keep "
        "them. Set NUMBA_CACHE_DIR to one that is."
    )
    return None
