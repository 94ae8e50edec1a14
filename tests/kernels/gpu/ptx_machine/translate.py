"""A block of PTX as the source of a Python function: one or two array operations an instruction.

Nothing is masked but memory accesses. Registers that other blocks read are merged under the mask of the active threads
at the block's end. An operation or an operand that is not known raises NotImplementedError with its text.
"""

from __future__ import annotations

from .operands import DTYPES, Operands, integer, is_register, stored
from .parse import Block, Instruction, elements, registers, width

_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
# Of integers, and of floats where that is another one.
_BINARY = {"add": ["{a} + {b}"], "sub": ["{a} - {b}"], "mul": ["{a} * {b}"]}
_BINARY |= {"and": ["{a} & {b}"], "or": ["{a} | {b}"], "xor": ["{a} ^ {b}"], "rem": ["np.fmod({a}, {b})"]}
_BINARY |= {"min": ["np.minimum({a}, {b})", "fmin({a}, {b})"], "max": ["np.maximum({a}, {b})", "fmax({a}, {b})"]}
_BINARY |= {"div": ["quotient({a}, {b})", "{a} / {b}"]}
_UNARY = {"neg": "-{a}", "not": "~{a}", "abs": "np.abs({a})", "sqrt": "np.sqrt({a})", "ex2": "np.exp2({a})"}
_UNARY |= {"lg2": "np.log2({a})", "rcp": "1 / {a}", "tanh": "np.tanh({a})"}
_REDUCE = {"add": "np.add", "min": "np.minimum", "max": "np.maximum"}
_REDUCE |= {"and": "np.bitwise_and", "or": "np.bitwise_or", "xor": "np.bitwise_xor"}
_ROUND = {"rmi": "np.floor", "rpi": "np.ceil", "rzi": "np.trunc", "rni": "np.rint"}
_WITH_NAN = ("add", "sub", "mul", "fma", "div", "sqrt", "max", "min")


class Translator(Operands):
    """Source of one block; ``sites`` gains its memory accesses, as ``(op, line, text)``."""

    def __init__(self, block: Block, index: dict[str, int], exposed: set[str], sites: list, constants: dict) -> None:
        super().__init__(constants)
        self.block, self.index, self.exposed, self.sites = block, index, exposed, sites

    def translate(self, number: int) -> str:
        """``def block<number>(S, R, m)``: of a gang, its registers and the mask; where to go on is returned."""
        instructions = self.block.instructions
        last = {r: i for i, one in enumerate(instructions) for r in [*one.reads, *one.results]}
        end = f"return {number + 1}"
        for i, instruction in enumerate(instructions):
            if instruction.ends_block:
                end = self._end(instruction, number)
                continue
            self._operation(instruction)
            touched = {r for r in [*instruction.reads, *instruction.results] if last[r] == i and r not in self.exposed}
            if dead := sorted(view for register in touched for view in self.views[register].values()):
                self.lines.append("del " + ", ".join(dead))
        for register in self.defined:
            if register in self.exposed:
                self.lines.append(f"keep(R, {register!r}, {self.canonical(register)}, m)")
        return f"def block{number}(S, R, m):\n    " + "\n    ".join([*self.lines, end]) + "\n"

    def _end(self, i: Instruction, number: int) -> str:
        if i.is_barrier:
            if i.operands != ["0"] or i.predicate is not None:
                raise NotImplementedError(f"a barrier that is not the whole CTA's: {i.text}")
            return f"return 'barrier', {number + 1}"
        if i.parts[0] == "bra":
            target = self.index[i.operands[-1]]
            return f"return {target}" if i.predicate is None else f"return {self.predicate(i)}, {target}, {number + 1}"
        if i.predicate is not None:
            raise NotImplementedError(i.text)
        return "return -1"

    def _operation(self, i: Instruction) -> None:
        parts = i.parts
        if (method := getattr(self, f"op_{parts[0]}", None)) is not None:
            method(i, parts)
        elif parts[0] in _BINARY:
            self._binary(i, parts, *_BINARY[parts[0]])
        elif parts[0] in _UNARY:
            a = self.source(i.operands[1], parts[-1])
            self._floats(i, parts, _UNARY[parts[0]].format(a=a))
        elif parts[0] not in ("bar", "barrier", "fence"):
            raise NotImplementedError(f"{i.text} at {i.line}")

    def _site(self, i: Instruction) -> int:
        self.sites.append((i.op, i.line, i.text))
        return len(self.sites) - 1

    # Arithmetic

    def _binary(self, i: Instruction, parts: list[str], of_integers: str, of_floats: str | None = None) -> None:
        type_ = parts[-1]
        a, b = (self.source(x, type_) for x in i.operands[1:])
        floats = type_[0] == "f"
        template = of_floats if floats and of_floats else of_integers
        if type_ == "f16x2":
            self.assign(i.operands[0], type_, f"unpaired({template.format(a=f'pairs({a})', b=f'pairs({b})')})", i)
        elif type_.startswith("bf16"):
            raise NotImplementedError(i.text)
        else:
            self._floats(i, parts, template.format(a=a, b=b))

    def _floats(self, i: Instruction, parts: list[str], expression: str) -> None:
        if parts[-1] == "f32" and parts[0] in _WITH_NAN:
            expression = f"canonical_nan({expression})"
        self.assign(i.operands[0], parts[-1], f"flushed({expression})" if "ftz" in parts else expression, i)

    def op_fma(self, i: Instruction, parts: list[str]) -> None:
        type_ = parts[-1]
        a, b, c = (self.source(x, type_) for x in i.operands[1:])
        if type_ == "f16x2":
            self.assign(i.operands[0], type_, f"unpaired(fma(pairs({a}), pairs({b}), pairs({c}), 'f2'))", i)
        elif type_ == "bf16x2":
            self.assign(i.operands[0], type_, f"fma_bf16x2({a}, {b}, {c})", i)
        else:
            self._floats(i, parts, f"fma({a}, {b}, {c}, '{DTYPES[type_]}')")

    def op_mul(self, i: Instruction, parts: list[str]) -> None:
        type_ = parts[-1]
        if "wide" in parts:
            self.assign(i.operands[0], _wide(type_), self._product(i, type_), i)
        elif "hi" in parts:
            bits = width(type_)
            if bits != 32:
                raise NotImplementedError(i.text)
            self.assign(i.operands[0], type_, f"({self._product(i, type_)} >> {bits}).astype('{DTYPES[type_]}')", i)
        else:
            self._binary(i, parts, *_BINARY["mul"])

    def _product(self, i: Instruction, type_: str) -> str:
        a, b = (f"{self.source(x, type_)}.astype('{DTYPES[_wide(type_)]}')" for x in i.operands[1:3])
        return f"({a} * {b})"

    def op_mad(self, i: Instruction, parts: list[str]) -> None:
        type_ = parts[-1]
        if "wide" in parts:
            c = self.source(i.operands[3], _wide(type_))
            self.assign(i.operands[0], _wide(type_), f"{self._product(i, type_)} + {c}", i)
        else:
            a, b, c = (self.source(x, type_) for x in i.operands[1:])
            self.assign(i.operands[0], type_, f"{a} * {b} + {c}", i)

    def op_dp4a(self, i: Instruction, parts: list[str]) -> None:
        a, b, c = (self.source(x, "u32") for x in i.operands[1:])
        self.assign(i.operands[0], "s32", f"dot_bytes({a}, {b}, {c}, '{parts[1]}', '{parts[2]}')", i)

    def op_popc(self, i: Instruction, parts: list[str]) -> None:
        self.assign(i.operands[0], "u32", f"np.bitwise_count({self.source(i.operands[1], parts[-1])}).astype('u4')", i)

    def op_shl(self, i: Instruction, parts: list[str]) -> None:
        self._shift(i, parts[-1], "<<")

    def op_shr(self, i: Instruction, parts: list[str]) -> None:
        self._shift(i, parts[-1], ">>")

    def _shift(self, i: Instruction, type_: str, symbol: str) -> None:
        d, a, b = i.operands
        bits, value = width(type_), self.source(a, type_)
        if is_register(b):
            self.assign(d, type_, f"shift({value}, {self.source(b, 'u32')}, {bits}, '{symbol}')", i)
        elif integer(b) >= bits and (symbol == "<<" or type_[0] != "s"):
            self.assign(d, type_, f"np.zeros_like({value})", i)
        else:
            self.assign(d, type_, f"{value} {symbol} {self.number(min(integer(b), bits - 1), type_)}", i)

    def op_shf(self, i: Instruction, parts: list[str]) -> None:
        if parts[2:] != ["wrap", "b32"]:
            raise NotImplementedError(i.text)
        d, low, high, by = i.operands
        n = integer(by) & 31
        if parts[1] == "r":
            n = (32 - n) & 31
        low, high = self.source(low, "u32"), self.source(high, "u32")
        if n == 0:
            self.assign(d, "u32", low if parts[1] == "r" else high, i)
        else:
            self.assign(d, "u32", f"({high} << {self.number(n)}) | ({low} >> {self.number(32 - n)})", i)

    def op_bfe(self, i: Instruction, parts: list[str]) -> None:
        d, a, position, length = i.operands
        position, length = integer(position), integer(length)
        if position + length > 32 or not length:
            raise NotImplementedError(i.text)
        if parts[-1] == "u32":
            field = f"({self.source(a, 'u32')} >> {self.number(position)}) & {self.number((1 << length) - 1)}"
        else:
            left, right = self.number(32 - position - length, "s32"), self.number(32 - length, "s32")
            field = f"({self.source(a, 's32')} << {left}) >> {right}"
        self.assign(d, parts[-1], field, i)

    def op_bfi(self, i: Instruction, parts: list[str]) -> None:
        d, a, b, position, length = i.operands
        mask = ((1 << integer(length)) - 1) << integer(position)
        a, b = (self.source(x, "u32") for x in (a, b))
        at, inside, outside = self.number(integer(position)), self.number(mask), self.number(~mask)
        self.assign(d, "u32", f"(({a} << {at}) & {inside}) | ({b} & {outside})", i)

    def op_lop3(self, i: Instruction, parts: list[str]) -> None:
        d, *given, table = i.operands
        a, b, c = (self.source(x, "u32") for x in given)
        self.assign(d, "u32", f"lop3({a}, {b}, {c}, {integer(table)})", i)

    def op_prmt(self, i: Instruction, parts: list[str]) -> None:
        d, a, b, selector = i.operands
        a, b = self.source(a, "u32"), self.source(b, "u32")
        if len(parts) > 2:
            raise NotImplementedError(i.text)
        selector = self.source(selector, "u32") if is_register(selector) else integer(selector)
        self.assign(d, "u32", f"permuted({a}, {b}, {selector})", i)

    def op_setp(self, i: Instruction, parts: list[str]) -> None:
        compare, type_ = parts[1], parts[-1]
        if len(i.operands) != 3 or type_.endswith("x2"):
            raise NotImplementedError(i.text)
        a, b = (self.source(x, type_) for x in i.operands[1:])
        ordered = f"(({a} == {a}) & ({b} == {b}))"
        if compare == "num":
            expression = ordered
        elif compare == "nan":
            expression = f"~{ordered}"
        elif type_[0] == "f" and compare == "ne":
            expression = f"({a} != {b}) & {ordered}"
        elif compare.endswith("u") and compare[:-1] in _COMPARE:
            expression = f"({a} {_COMPARE[compare[:-1]]} {b}) | ~{ordered}"
        else:
            expression = f"{a} {_COMPARE[compare]} {b}"
        self.assign(i.operands[0], "pred", expression, i)

    def op_selp(self, i: Instruction, parts: list[str]) -> None:
        d, a, b, p = i.operands
        type_ = parts[-1]
        a, b, p = self.source(a, type_), self.source(b, type_), self.source(p, "pred")
        self.assign(d, type_, f"where({p}, {a}, {b})", i)

    def op_mov(self, i: Instruction, parts: list[str]) -> None:
        d, a = i.operands
        whole = width(parts[-1])
        pieces = elements(d if d.startswith("{") else a)
        each = whole // len(pieces)
        if d.startswith("{"):
            value = self.source(a, f"u{whole}")
            for k, piece in enumerate(pieces):
                shifted = f"({value} >> {self.number(each * k, f'u{whole}')})" if k else value
                self.assign(piece, f"u{each}", f"{shifted}.astype('u{each // 8}')", i)
        elif a.startswith("{"):
            terms = [f"{self.source(piece, f'u{each}')}.astype('u{whole // 8}')" for piece in pieces]
            terms = [f"({t} << {self.number(each * k, f'u{whole}')})" if k else t for k, t in enumerate(terms)]
            self.assign(d, f"u{whole}", " | ".join(terms), i)
        elif a.startswith("%"):
            self.assign(d, parts[-1], self.source(a, parts[-1]), i)
        else:
            self.assign(d, parts[-1], f"uniform({self.source(a, parts[-1])})", i)

    def op_cvt(self, i: Instruction, parts: list[str]) -> None:
        to, of = parts[-2:]
        d, *given = i.operands
        if (to, of) in _CONVERSIONS:
            arguments = ", ".join(self.source(a, of) for a in given)
            bits = to if to == "f32" else f"u{width(to)}"
            self.assign(d, bits, f"{_CONVERSIONS[to, of]}({arguments})", i)
            return
        value = self.source(given[0], of)
        if of[0] == "f" and to[0] in "su":
            if "rzi" not in parts or to != "s32":
                raise NotImplementedError(i.text)
            self.assign(d, to, f"truncated({value})", i)
        elif of == to == "f32":
            self._floats(i, parts, f"{_ROUND[parts[1]]}({value})")
        elif "sat" in parts or stored(to) not in DTYPES or stored(of) != of:
            raise NotImplementedError(i.text)
        else:  # integers to integers or to numbers, numbers to wider ones
            self.assign(d, to, f"{value}.astype('{DTYPES[to]}')", i)

    # Memory

    def op_ld(self, i: Instruction, parts: list[str]) -> None:
        d, address = i.operands
        space, type_ = parts[1], parts[-1]
        if space == "param":
            name = address.strip("[]")
            self.assign(d, type_, f"S.params[{name!r}].view('{DTYPES[stored(type_)]}')", i)
            return
        pieces = elements(d)
        arguments = f"{self.address(address)}, {width(type_) // 8}, {len(pieces)}, {self.mask(i)}, {self._site(i)}"
        self.assign_all(pieces, type_, f"S.load_{space}({arguments})", i)

    def op_st(self, i: Instruction, parts: list[str]) -> None:
        address, values = i.operands
        space, bits = parts[1], width(parts[-1])
        values = ", ".join(self.source(value, f"u{bits}") for value in elements(values))
        arguments = f"{self.address(address)}, {bits // 8}, [{values}], {self.mask(i)}, {self._site(i)}"
        self.lines.append(f"S.store_{space}({arguments})")

    def op_cp(self, i: Instruction, parts: list[str]) -> None:
        if parts[1] != "async" or "bulk" in parts or "mbarrier" in parts:
            raise NotImplementedError(i.text)
        if "commit_group" in parts:
            self.lines.append("S.commit()")
        elif "wait_group" in parts:
            self.lines.append(f"S.wait({integer(i.operands[0])})")
        elif "wait_all" in parts:
            self.lines.append("S.commit(); S.wait(0)")
        else:
            to, of, size, *given = i.operands
            given = self.source(given[0], "u32") if given else f"uniform({self.number(integer(size))})"
            arguments = f"{self.address(to)}, {self.address(of)}, {integer(size)}, {given}"
            self.lines.append(f"S.copy({arguments}, {self.mask(i)}, {self._site(i)})")

    def op_ldmatrix(self, i: Instruction, parts: list[str]) -> None:
        pieces = elements(i.operands[0])
        arguments = f"{self.address(i.operands[1])}, {len(pieces)}, {'trans' in parts}, {self.mask(i)}, {self._site(i)}"
        self.assign_all(pieces, "u32", f"S.load_matrix({arguments})", i)

    def op_stmatrix(self, i: Instruction, parts: list[str]) -> None:
        values = ", ".join(self.source(value, "u32") for value in elements(i.operands[1]))
        arguments = f"{self.address(i.operands[0])}, [{values}], {'trans' in parts}, {self.mask(i)}, {self._site(i)}"
        self.lines.append(f"S.store_matrix({arguments})")

    # Between the lanes of a warp

    def op_mma(self, i: Instruction, parts: list[str]) -> None:
        if parts[3] != "m16n8k16" or parts[-4] != "f32" or parts[-1] != "f32":
            raise NotImplementedError(i.text)
        d, a, b, c = (elements(o) for o in i.operands)
        a, b = (", ".join(self.source(x, "u32") for x in y) for y in (a, b))
        c = ", ".join(self.source(x, "f32") for x in c)
        self.assign_all(d, "f32", f"mma([{a}], [{b}], [{c}], '{parts[-2]}')", i)

    def op_movmatrix(self, i: Instruction, parts: list[str]) -> None:
        self.assign(i.operands[0], "u32", f"transposed_matrix({self.source(i.operands[1], 'u32')})", i)

    def op_redux(self, i: Instruction, parts: list[str]) -> None:
        value = self.source(i.operands[1], parts[-1])
        self.assign(i.operands[0], parts[-1], f"reduce_lanes({value}, {_REDUCE[parts[2]]})", i)

    def op_shfl(self, i: Instruction, parts: list[str]) -> None:
        d, a, by, clamp, _ = i.operands
        if integer(clamp) != (0 if parts[2] == "up" else 31) or not registers(d):
            raise NotImplementedError(i.text)
        by = self.source(by, "u32") if is_register(by) else integer(by)
        self.assign(d, "u32", f"shuffle({self.source(a, 'u32')}, {by}, '{parts[2]}')", i)


_CONVERSIONS = {
    ("f16x2", "e4m3x2"): "halves_of_float8",
    ("e4m3x2", "f32"): "float8_of_floats",
    ("bf16x2", "f32"): "bf16x2_bits",
    ("f16x2", "f32"): "f16x2_bits",
    ("bf16", "f32"): "bf16_bits",
    ("f16", "f32"): "f16_bits",
    ("f32", "bf16"): "of_bf16",
}


def _wide(type_: str) -> str:
    return f"{type_[0]}{2 * width(type_)}"
