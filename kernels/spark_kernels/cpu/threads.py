"""How the parallel kernels are called."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable

import numba
import torch

_one_at_a_time = threading.Lock()
# PyTorch's thread count at this thread's last call.
_last = threading.local()


def call_parallel(kernel: Callable[..., None], *args: object) -> None:
    """Call a numba kernel on as many threads as PyTorch would use.

    SGLang sets PyTorch's thread count per process, and with tensor parallelism per rank; numba's own default is one
    per core, which it cannot exceed. Kernels may be called from any thread, but run one at a time: numba's
    ``workqueue`` layer, used where OpenMP is missing, aborts the process on concurrent calls.
    """
    with _one_at_a_time:
        threads = torch.get_num_threads()
        if threads != getattr(_last, "threads", None):
            _use_threads(threads)
            _last.threads = threads
        kernel(*args)


def _use_threads(threads: int) -> None:
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    # Starting numba's OpenMP layer changes the OpenMP runtime, which PyTorch shares: it sets the thread count, and it
    # allows nested parallel regions. With them the matrix products within PyTorch's attention, parallel already,
    # start threads of their own, and a call of 0.1 ms takes 15 ms.
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).omp_set_max_active_levels(1)
