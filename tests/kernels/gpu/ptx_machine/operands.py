"""Operands of PTX as Python expressions over arrays ``[CTAs, warps, lanes]``.

An axis has length 1 where the value does not vary, so that what is the same for all lanes, warps or CTAs is computed
once. A register's bits may stand as arrays of several dtypes; `Operands.views` are those that are known.
"""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np

from .parse import OWN_TYPES, REGISTER, Instruction, width

DTYPES = {f"u{bits}": f"u{bits // 8}" for bits in (8, 16, 32, 64)}
DTYPES |= {f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)}
DTYPES |= {f"f{bits}": f"f{bits // 8}" for bits in (16, 32, 64)}
_INTEGER = re.compile(r"-?(0x[0-9a-fA-F]+|\d+)U?")


def is_register(operand: str) -> bool:
    return bool(REGISTER.fullmatch(operand))


def own_type(register: str) -> str:
    return OWN_TYPES[REGISTER.fullmatch(register)[1]]


def integer(operand: str) -> int:
    return int(operand.rstrip("U"), 0)


def stored(type_: str) -> str:
    """The type of arrays that hold ``type_``: bits, bfloat16 and pairs of numbers are unsigned integers."""
    return f"u{width(type_)}" if type_[0] == "b" or type_.endswith("x2") else type_


class Operands:
    """The expressions of one block, and the statements that they need."""

    def __init__(self, constants: dict[str, np.generic]) -> None:
        self.constants = constants
        self.lines: list[str] = []
        self.views: defaultdict[str, dict[str, str]] = defaultdict(dict)
        self.defined: dict[str, None] = {}
        self._temporaries = 0

    def constant(self, value: np.generic) -> str:
        name = f"K_{value.dtype.str[1:]}_{value.tobytes().hex()}".replace("?", "bool")
        self.constants[name] = value
        return name

    def number(self, value: int, type_: str = "u32") -> str:
        """A constant integer of ``type_``, modulo its width."""
        bits = width(type_)
        return self.constant(np.array(value % (1 << bits), f"u{bits // 8}").view(DTYPES[stored(type_)])[()])

    def source(self, operand: str, type_: str) -> str:
        """``operand`` read as ``type_``."""
        type_ = stored(type_)
        if is_register(operand):
            return self._register(operand, type_)
        if operand.startswith(("0f", "0d")):
            raw = np.array(int(operand[2:], 16), "u4" if operand.startswith("0f") else "u8")
            return self.constant(raw.view(DTYPES[type_])[()] if type_[0] == "f" else raw[()])
        if _INTEGER.fullmatch(operand):
            value = integer(operand)
            return self.constant(np.bool_(value)) if type_ == "pred" else self.number(value, type_)
        if operand == "global_smem":
            return self.number(0, type_)
        if operand.startswith("%"):
            return f"S.special[{operand!r}]"
        raise NotImplementedError(f"operand {operand}")

    def _register(self, operand: str, type_: str) -> str:
        own, views, name = own_type(operand), self.views[operand], operand[1:]
        if operand not in self.defined and own not in views:
            self.lines.append(f"{name} = R[{operand!r}]")
            views[own] = name
        if type_ == own:
            return self.canonical(operand)
        if type_ not in views:
            base = self.canonical(operand)
            if width(type_) != width(own):  # the low part
                base = f"{base}.astype('u{width(type_) // 8}')"
            self.lines.append(f"{name}_{type_} = {base}.view('{DTYPES[type_]}')")
            views[type_] = f"{name}_{type_}"
        return views[type_]

    def canonical(self, register: str) -> str:
        """A register as its own type."""
        own, views = own_type(register), self.views[register]
        if own not in views:
            self.lines.append(f"{register[1:]} = {next(iter(views.values()))}.view('{DTYPES[own]}')")
            views[own] = register[1:]
        return views[own]

    def assign(self, register: str, type_: str, expression: str, instruction: Instruction) -> None:
        """``register = expression``, an array of ``type_``; a wider register takes it extended."""
        if register == "_":
            return
        type_, own, name = stored(type_), own_type(register), register[1:]
        if own != "pred" and width(type_) != width(own):
            kind = "s" if type_[0] == "s" else "u"
            type_ = f"{kind}{width(own)}"
            expression = f"({expression}).astype('{DTYPES[type_]}')"
        if instruction.predicate is not None:
            old = self.source(register, own)
            view = expression if type_ == own else f"({expression}).view('{DTYPES[own]}')"
            type_, expression = own, f"where({self.predicate(instruction)}, {view}, {old})"
        target = name if type_ == own else f"{name}_{type_}"
        self.lines.append(f"{target} = {expression}")
        self.views[register] = {type_: target}
        self.defined[register] = None

    def assign_all(self, registers: list[str], type_: str, call: str, instruction: Instruction) -> None:
        """``registers = call``, which gives a list where there are several."""
        if len(registers) == 1:
            return self.assign(registers[0], type_, call, instruction)
        self._temporaries += 1
        temporary = f"t{self._temporaries}"
        self.lines.append(f"{temporary} = {call}")
        for k, register in enumerate(registers):
            self.assign(register, type_, f"{temporary}[{k}]", instruction)
        self.lines.append(f"del {temporary}")

    def predicate(self, instruction: Instruction) -> str:
        p = self.source(instruction.predicate, "pred")
        return f"~{p}" if instruction.negated else p

    def mask(self, instruction: Instruction) -> str:
        return "m" if instruction.predicate is None else f"both(m, {self.predicate(instruction)})"

    def address(self, operand: str) -> str:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        if base == "global_smem":
            return self.number(int(offset or 0))
        own = own_type(base)
        expression = self.source(base, own)
        return f"({expression} + {self.number(int(offset), own)})" if offset and int(offset) else expression
