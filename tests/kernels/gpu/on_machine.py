"""A pytest plugin, ``-p on_machine``: the tests' kernels run on the PTX machine, and no launch may race.

``SPARK_MACHINE_ARCH`` is the compute capability, 89 by default: it has float8 numbers and no wgmma. No machine code is
made, so the cache of compiled kernels is one of its own.
"""

import os
import tempfile
from pathlib import Path

import pytest
from ptx_machine.driver import MachineDriver
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

ARCH = int(os.environ.get("SPARK_MACHINE_ARCH", "89"))
CUDABackend.make_cubin = lambda *arguments: b"none"
knobs.cache.dir = str(Path(os.environ.get("TRITON_CACHE_DIR", tempfile.gettempdir())) / "ptx_machine")
MACHINE = MachineDriver(ARCH, order="alone", counts=False)


@pytest.fixture(autouse=True)
def machine(request, monkeypatch):
    monkeypatch.setattr(driver, "_active", MACHINE)
    monkeypatch.setattr("spark_kernels.implementation.runs_triton", lambda device: True)
    MACHINE.reports.clear()
    yield MACHINE
    assert not MACHINE.races, "\n".join(MACHINE.races)
