"""A GPU that Triton compiles and launches for, and that runs nothing.

With it a kernel's launch takes Triton's own path: the arguments are bound and specialised, the kernel is compiled for
the GPU to machine code, and its launcher is called; only loading and running the code are left out.
"""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget

from machine_code import MachineCode

MAX_SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


# Triton remembers kernels by the number of the device.
_numbers = count()


class Launch(NamedTuple):
    """One launch: the kernel's name, its grid, and the types of its arguments, ``constexpr`` of constants."""

    kernel: str
    grid: tuple[int, int, int]
    signature: dict[str, str]
    shared_bytes: int
    spill_bytes: int


class StubDriver:
    """What `triton.runtime.driver.active` is expected to be.

    Parameters
    ----------
    arch
        Compute capability of the GPU, as 90.
    """

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches: list[Launch] = []
        # Names of the kernels compiled, once for each variant.
        self.loaded: list[str] = []
        self._number = next(_numbers)
        self._target = GPUTarget("cuda", arch, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": MAX_SHARED_BYTES[arch]},
            load_binary=self._load_binary,
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0

    def _load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, int, int, int, int]:
        """The module, the function, its registers, its spills, and the most threads of a block.

        The function, which Triton hands on to the launcher, is here the number of bytes spilled.
        """
        code = MachineCode.of(binary)
        self.loaded.append(name)
        return name, code.spill_bytes, code.registers, code.spill_bytes, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        signature = dict(source.signature)

        def launch(grid_x, grid_y, grid_z, stream, function, packed, launch_metadata, enter, leave, *arguments) -> None:
            assert len(arguments) == len(signature)
            grid = grid_x, grid_y, grid_z
            self.launches.append(Launch(metadata.name, grid, signature, metadata.shared, function))

        return launch
