"""A launch, the CTAs that run side by side, and their warps.

Warps run in gangs: in order ``lockstep`` all of them are one; in ``random`` those of one number are a gang, and gangs
take turns block by block; in ``alone`` a gang runs up to its barrier before another starts. Gangs are drawn at random.
What no barrier orders then happens in some other order; races are found in any.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy as np
import torch

from . import arithmetic
from .accesses import Accesses
from .memory import GlobalMemory, Shadow
from .parse import Kernel, exposed_registers, pointers, registers, width
from .report import Report
from .translate import Translator

ORDERS = ("lockstep", "random", "alone")
# CTAs that run at once; their number costs memory and saves time.
CTAS = 64


@dataclass
class Program:
    """A kernel as Python functions, one a block; ``reach`` are the parameters from which each site's address comes."""

    kernel: Kernel
    functions: list
    sites: list[tuple[str, str, str]]
    reach: list[set[str]]

    @classmethod
    def of(cls, text: str) -> Program:
        kernel = Kernel.parse(text)
        index = {block.label: n for n, block in enumerate(kernel.blocks)}
        exposed, sites, constants = exposed_registers(kernel), [], {}
        blocks = [Translator(b, index, exposed, sites, constants).translate(n) for n, b in enumerate(kernel.blocks)]
        scope = vars(arithmetic) | constants
        exec(compile("".join(blocks), f"<{kernel.name}>", "exec"), scope)
        of = pointers(kernel)
        addresses = ([r for a in re.findall(r"\[[^]]*\]", text) for r in registers(a)] for _, _, text in sites)
        reach = [set().union(*(of.get(r, set()) for r in given)) for given in addresses]
        return cls(kernel, [scope[f"block{n}"] for n in range(len(kernel.blocks))], sites, reach)

    def granule(self, space: str, largest: int) -> int:
        """The bytes of the smallest access to ``space``, at most ``largest``."""
        types = (op.split(".")[-1] for op, _, _ in self.sites if f".{space}" in op and "matrix" not in op)
        return min([largest, *(width(t) // 8 for t in types if t[1:].isdigit())])


class Launch:
    """One launch over CPU tensors; ``params`` are arrays of the PTX parameters by name."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        params: dict[str, np.ndarray],
        tensors: list[torch.Tensor],
        shared_bytes: int,
        *,
        order: str = "lockstep",
        seed: int = 0,
        check: bool = True,
        counts: bool = True,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order={order!r}: one of {', '.join(ORDERS)}")
        self.program, self.grid, self.params, self.order = program, grid, params, order
        self.check, self.counts = check, counts
        self.num_warps = program.kernel.num_threads // 32
        self.shared_bytes = -(-shared_bytes // 128) * 128
        self.memory = GlobalMemory(tensors)
        self.report = Report(program.kernel.name, program.sites, [0] * len(program.kernel.blocks))
        self.random = random.Random(seed)
        self.shadow, self.watched = None, set()
        if check:
            self.shadow = Shadow(self.memory.packed_size, program.granule("global", 4), self.num_warps, self.report)
            self.watched = self._watched()

    def _watched(self) -> set[int]:
        """Sites that load from tensors to which the kernel stores."""
        regions = {n: self.memory.region(v.item()) for n, v in self.params.items() if v.dtype == "u8" and v.item()}
        reach = [{regions[name] for name in names if name in regions} for names in self.program.reach]
        sites = list(zip(reach, self.program.sites, strict=True))
        written = set().union(*(r for r, site in sites if site[0].startswith("st.global")))
        return {n for n, (r, site) in enumerate(sites) if ".global" in site[0] and (not r or r & written)}

    def run(self) -> Report:
        numbers = np.unravel_index(np.arange(int(np.prod(self.grid))), self.grid[::-1])
        ctas = np.stack(numbers, -1)[:, ::-1]
        with np.errstate(all="ignore"):
            for first in range(0, len(ctas), CTAS):
                Machine(self, ctas[first : first + CTAS], first).run()
        self.report.warps = len(ctas) * self.num_warps
        for warps, block in zip(self.report.blocks, self.program.kernel.blocks, strict=True):
            for instruction in block.instructions:
                self.report.instructions[instruction.op] += warps
        return self.report


class Machine:
    """Some CTAs of a launch; their shared memory begins as 0xFF."""

    def __init__(self, launch: Launch, ctas: np.ndarray, first_cta: int) -> None:
        self.launch, self.ctas, self.first_cta = launch, ctas, first_cta
        self.shared_bytes = launch.shared_bytes
        self.shared = np.full(len(ctas) * self.shared_bytes + 16, 0xFF, "u1")
        self.epoch = np.zeros(len(ctas), "i4")
        self.shadow = None
        if launch.check and self.shared_bytes:
            granule = launch.program.granule("shared", 2)
            self.shadow = Shadow(len(self.shared), granule, launch.num_warps, launch.report)
        warps = np.arange(launch.num_warps)
        self.gangs = [Gang(self, warps)] if launch.order == "lockstep" else [Gang(self, warps[[w]]) for w in warps]

    def run(self) -> None:
        draw = self.launch.random.choice
        while True:
            while running := [gang for gang in self.gangs if gang.groups]:
                gang = draw(running)
                gang.step()
                while self.launch.order == "alone" and gang.groups:
                    gang.step()
            if not any(gang.waiting for gang in self.gangs):
                return
            self._barrier()

    def _barrier(self) -> None:
        """All threads that have not ended wait; let them on."""
        self.epoch += 1
        for gang in self.gangs:
            if gang.waiting:
                self.launch.report.barriers += int(np.any([*gang.waiting.values()], 0).any(-1).sum())
            gang.groups, gang.waiting = gang.waiting, {}


class Registers(dict):
    """Registers by name; one that nobody wrote yet is full of ones."""

    def __missing__(self, register: str) -> np.ndarray:
        dtype = {"p": "?", "rs": "u2", "r": "u4", "rd": "u8", "f": "u4", "fd": "u8"}[register.strip("%0123456789")]
        return np.ones((1, 1, 1), dtype) * np.array(-1).astype(dtype)


class Gang(Accesses):
    """Warps of the same numbers in all CTAs of a machine: their registers, and the block that each thread is at."""

    def __init__(self, machine: Machine, warps: np.ndarray) -> None:
        super().__init__(machine, warps)
        self.registers = Registers()
        self.groups = {0: np.ones(self.shape, bool)}
        self.waiting: dict[int, np.ndarray] = {}

    def step(self) -> None:
        """Run the earliest block, for the threads that are at it."""
        number = min(self.groups)
        mask = self.groups.pop(number)
        m = None if mask.all() else mask
        self.launch.report.blocks[number] += int(mask.any(-1).sum())
        match self.launch.program.functions[number](self, self.registers, m):
            case ("barrier", after):
                self._go(self.waiting, after, mask)
            case (taken, target, after):
                self._go(self.groups, target, mask & taken)
                self._go(self.groups, after, mask & ~taken)
            case after if after >= 0:
                self._go(self.groups, after, mask)

    @staticmethod
    def _go(groups: dict[int, np.ndarray], number: int, mask: np.ndarray) -> None:
        if mask.any():
            groups[number] = groups[number] | mask if number in groups else mask
