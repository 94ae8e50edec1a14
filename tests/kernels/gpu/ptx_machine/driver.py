"""A GPU for Triton whose launches run on the machine, over CPU tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from stub_driver import StubDriver
from triton.runtime.cache import get_cache_manager

from .machine import Launch, Program
from .report import Report

_DTYPES = {"f32": "f4", "f64": "f8"}


class MachineDriver(StubDriver):
    """What `triton.runtime.driver.active` is expected to be.

    Triton compiles as for a GPU of compute capability ``arch``; ``options`` are those of `Launch`. `reports` are those
    of all launches so far.
    """

    programs: dict[str, Program] = {}  # noqa: RUF012

    def __init__(self, arch: int = 80, **options) -> None:
        super().__init__(arch)
        self.options = options
        self.reports: list[Report] = []

    def _load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, None, int, int, int]:
        return name, None, 0, 0, 1024

    @property
    def races(self) -> list[str]:
        return [race for report in self.reports for race in report.described_races()]

    def launcher_cls(self, source, metadata):
        types = list(source.signature.values())

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            program = self._program(metadata)
            given = [a for a, t in zip(arguments, types, strict=True) if t != "constexpr"]
            tensors = [a for a in given if isinstance(a, torch.Tensor)]
            # Two more: scratch memory, which no kernel of ours asks for.
            params = zip(program.kernel.params, [*given, 0, 0], strict=True)
            values = {name: _param(value, type_) for (name, type_), value in params}
            self.reports.append(Launch(program, (x, y, z), values, tensors, metadata.shared, **self.options).run())

        return launch

    def _program(self, metadata) -> Program:
        if metadata.hash not in self.programs:
            files = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json")
            self.programs[metadata.hash] = Program.of(Path(files[f"{metadata.name}.ptx"]).read_text())
        return self.programs[metadata.hash]


def _param(value: torch.Tensor | int | float, type_: str) -> np.ndarray:
    value = value.data_ptr() if isinstance(value, torch.Tensor) else value
    if type_ in _DTYPES:
        return np.full((1, 1, 1), value, _DTYPES[type_])
    bits = int(type_[1:])
    return np.full((1, 1, 1), int(value) % (1 << bits), f"u{bits // 8}")
