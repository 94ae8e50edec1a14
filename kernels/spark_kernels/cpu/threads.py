"""How the parallel kernels are called."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numba
import torch

_one_at_a_time = threading.Lock()


def call_parallel(kernel: Callable[..., None], *args: object) -> None:
    """Call a numba kernel on as many threads as PyTorch would use.

    SGLang sets PyTorch's thread count per process, and with tensor parallelism per rank; numba's own default is one
    per core, which it cannot exceed. Kernels may be called from any thread, but run one at a time: numba's
    ``workqueue`` layer, used where OpenMP is missing, aborts the process on concurrent calls.
    """
    with _one_at_a_time:
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        # Starting numba's OpenMP layer sets the thread count of the OpenMP runtime, which PyTorch shares.
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        kernel(*args)
