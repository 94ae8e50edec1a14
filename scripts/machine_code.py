"""GPU machine code, read by the tools in Triton's wheel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


class Instruction(NamedTuple):
    address: int
    is_conditional: bool
    op: str
    target: int | None
    """The last address among its arguments: where a branch leads."""


@dataclass(frozen=True)
class MachineCode:
    """A kernel as compiled: its instructions in order, and what a thread and a program take."""

    instructions: list[Instruction]
    registers: int
    spill_bytes: int

    @classmethod
    def of(cls, cubin: bytes) -> MachineCode:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            usage = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("-res-usage", file.name))
            listing = _cuobjdump("-sass", file.name)
        return cls(parse(listing), int(usage[1]), int(usage[2]))

    def loop_length(self) -> int:
        """Instructions of the longest loop: from the target of a backward branch to the branch."""
        longest = (0, 0)
        for instruction in self.instructions:
            if _is_branch(instruction) and instruction.address - instruction.target > longest[1] - longest[0]:
                longest = instruction.target, instruction.address
        return sum(longest[0] <= instruction.address <= longest[1] for instruction in self.instructions)

    def usual_length(self, rounds: int) -> int:
        """Instructions up to the end of the program, if loops take ``rounds`` and branches forward are taken.

        Compilers lead those round what is rarely executed. A branch for the case that the threads of a warp diverge
        (BRA.DIV) is not taken.
        """
        index = {instruction.address: i for i, instruction in enumerate(self.instructions)}
        count = i = 0
        while True:
            instruction = self.instructions[i]
            count += 1
            if instruction.op == "EXIT" and not instruction.is_conditional:
                return count
            i += 1
            if instruction.op == "BRA":
                target = index[instruction.target]
                if target < i:
                    count += (rounds - 1) * (i - target)
                else:
                    i = target


def parse(listing: str) -> list[Instruction]:
    """Instructions of a listing by cuobjdump."""
    instructions = []
    for address, predicate, op, arguments in _INSTRUCTION.findall(listing):
        addresses = re.findall(r"0x([0-9a-f]+)", arguments)
        target = int(addresses[-1], 16) if addresses else None
        instructions.append(Instruction(int(address, 16), bool(predicate), op, target))
    return instructions


def _is_branch(instruction: Instruction) -> bool:
    return instruction.op.startswith("BRA") and instruction.target is not None


def _cuobjdump(flag: str, path: str) -> str:
    result = subprocess.run([_TOOLS / "cuobjdump", flag, path], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
