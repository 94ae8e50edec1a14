"""The text of a kernel in PTX, as basic blocks of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
REGISTER = re.compile(r"%(p|rs|rd|r|fd|f)\d+")
# A register's own type: what its bits are read as where nothing says otherwise.
OWN_TYPES = {"p": "pred", "rs": "u16", "r": "u32", "rd": "u64", "f": "u32", "fd": "u64"}
_WIDTHS = {"pred": 1, "f16x2": 32, "bf16x2": 32, "bf16": 16, "e4m3x2": 16}
# These write no register.
WITHOUT_RESULT = ("st", "stmatrix", "fence", "bar", "barrier", "bra", "ret", "cp", "red", "exit")


@dataclass
class Instruction:
    """One statement: its operation, operands and predicate, and the line of Python that it comes from."""

    op: str
    operands: list[str]
    predicate: str | None
    negated: bool
    line: str
    text: str

    @classmethod
    def parse(cls, statement: str, line: str) -> Instruction:
        match = _STATEMENT.fullmatch(statement)
        if match is None:
            raise NotImplementedError(f"{statement!r} at {line}")
        negated, predicate, op, rest = match.groups()
        return cls(op, [o.strip() for o in _OPERAND.findall(rest)], predicate, bool(negated), line, statement)

    @property
    def parts(self) -> list[str]:
        return self.op.replace("::", ".").split(".")

    @property
    def is_barrier(self) -> bool:
        """Whether all warps of the CTA meet here. Lanes of one warp run in step, so that theirs do nothing."""
        return self.parts[0] in ("bar", "barrier") and "warp" not in self.parts

    @property
    def ends_block(self) -> bool:
        return self.parts[0] in ("bra", "ret", "exit") or self.is_barrier

    @property
    def results(self) -> list[str]:
        return registers(self.operands[0]) if self.operands and self.parts[0] not in WITHOUT_RESULT else []

    @property
    def reads(self) -> list[str]:
        """The registers read; a predicated result keeps its old value where the predicate does not hold."""
        of_results = self.parts[0] in WITHOUT_RESULT or self.predicate is not None
        given = self.operands if of_results else self.operands[1:]
        return [r for operand in [*given, self.predicate or ""] for r in registers(operand)]


@dataclass
class Block:
    label: str
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Kernel:
    """``params`` are names and types in order, as ``("_k_param_0", "u64")``."""

    name: str
    params: list[tuple[str, str]]
    blocks: list[Block]
    num_threads: int

    @classmethod
    def parse(cls, text: str) -> Kernel:
        files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
        entry = re.search(r"\.visible \.entry (\w+)\(\n?(.*?)\)\s*\n(.*?)\{\n", text, re.S)
        name, params, attributes = entry.groups()
        types = [(p.split()[-1], re.search(r"\.([usfb]\d+)", p)[1]) for p in params.split(",\n") if p.strip()]
        num_threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", attributes)[1])
        return cls(name, types, _blocks(_body(text[entry.end() :]), files), num_threads)


def _body(text: str) -> str:
    """Up to the brace that closes what is open at the start, without comments."""
    text = re.sub(r"//[^\n]*", "", text)
    depth = 1
    for brace in re.finditer(r"[{}]", text):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[: brace.start()]
    raise ValueError("a brace is never closed")


def _blocks(body: str, files: dict[str, str]) -> list[Block]:
    blocks, line = [Block("entry")], "?"
    for statement in re.split(r"[;\n]", body):
        statement = statement.strip()
        if label := re.fullmatch(r"(\$\w+):", statement):
            if label[1].startswith("$L__BB"):
                blocks.append(Block(label[1]))
        elif statement.startswith(".loc"):
            _, number, at = statement.split()[:3]
            line = f"{files.get(number, number)}:{at}"
        elif statement and statement not in "{}" and not statement.startswith((".", "$")):
            if blocks[-1].instructions and blocks[-1].instructions[-1].ends_block:
                blocks.append(Block(f"after{len(blocks)}"))
            blocks[-1].instructions.append(Instruction.parse(statement, line))
    return [block for block in blocks if block.instructions or block.label.startswith("$")]


def registers(operand: str) -> list[str]:
    return [match[0] for match in REGISTER.finditer(operand)]


def elements(operand: str) -> list[str]:
    """``{a, b}`` is ``[a, b]``."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def width(type_: str) -> int:
    """Bits of a type."""
    return {"pred": 1, "f16x2": 32, "bf16x2": 32, "bf16": 16, "e4m3x2": 16}.get(type_) or int(
        re.search(r"\d+", type_)[0]
    )


def exposed_registers(kernel: Kernel) -> set[str]:
    """Registers that some block reads before it writes them: what has to outlive a block."""
    exposed: set[str] = set()
    for block in kernel.blocks:
        defined: set[str] = set()
        for instruction in block.instructions:
            exposed.update(r for r in instruction.reads if r not in defined)
            defined.update(instruction.results)
    return exposed


def pointers(kernel: Kernel) -> dict[str, set[str]]:
    """The parameters from which each register may have been computed, those read from memory aside."""
    of: dict[str, set[str]] = {}
    changed = True
    while changed:
        changed = False
        for instruction in (i for block in kernel.blocks for i in block.instructions):
            space = instruction.parts[1] if instruction.parts[0] == "ld" else None
            if space == "param":
                new = {instruction.operands[1].strip("[] ")} if width(instruction.parts[-1]) == 64 else set()
            elif space is None:
                new = set().union(*(of.get(r, set()) for r in instruction.reads))
            else:
                continue
            for register in instruction.results:
                if not new <= of.setdefault(register, set()):
                    of[register] |= new
                    changed = True
    return of
