"""One kernel as basic blocks of instructions: names are resolved to registers, and called functions are inlined."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from oner_fast.benchmarks.gpuless.ptx.parse import (
    Function,
    Module,
    PtxError,
    Statement,
    Variable,
    parse_variable,
    split_operands,
)

REGISTER_CLASS = {
    "pred": "p", "b8": "h", "u8": "h", "s8": "h", "b16": "h", "u16": "h", "s16": "h", "f16": "h", "bf16": "h",
    "b32": "r", "u32": "r", "s32": "r", "f32": "r", "f16x2": "r", "bf16x2": "r",
    "b64": "q", "u64": "q", "s64": "q", "f64": "q",
}  # fmt: skip
ENDS_BLOCK = re.compile(r"(bra|brx|ret|exit|trap|bar|barrier)\b(?!\.warp)")
NAME = re.compile(r"[%\w$.]+")
MAX_CALL_DEPTH = 16


@dataclass(frozen=True)
class Register:
    """A register: its class (p: predicate, h: 16 bits, r: 32 bits, q: 64 bits) and its number in it."""

    cls: str
    index: int


@dataclass(frozen=True)
class Symbol:
    """A variable.

    Args:
        space: shared, local, global, const, param or dynamic.
        offset: in bytes; for global and const, the number of the variable.
    """

    space: str
    offset: int


Name = Register | Symbol
Scope = dict[str, Name]


@dataclass
class Instruction:
    """An instruction with its operands.

    Args:
        op: `root.modifiers`.
        args: the operands as text.
        guard: the predicate under which it runs; `negated` inverts the predicate.
        names: the register or variable of each name among the operands.
        text, line, source: as in `parse.Statement`.
        index: its number in the program.
    """

    op: str
    args: list[str]
    guard: Register | None
    negated: bool
    names: Mapping[str, Name]
    text: str
    line: int
    source: str
    index: int = 0

    @property
    def where(self) -> str:
        """The source line and the instruction, for messages."""
        return f"{self.source + ': ' if self.source else ''}{self.text}"

    def unsupported(self, why: str = "not emulated") -> PtxError:
        """Return the error that names the instruction and its line."""
        return PtxError(f"{why}: PTX line {self.line}{' (' + self.source + ')' if self.source else ''}: {self.text}")


def align_up(size: int, to: int) -> int:
    """Round up to a multiple."""
    return -(-size // to) * to


@dataclass(frozen=True)
class _Frame:
    """One expansion of a function: `end` is the label after the inlined call, `stack` lists the calling functions."""

    function: Function
    scopes: list[Scope]
    labels: _Labels
    end: str | None
    stack: Sequence[str]

    def lookup(self, name: str) -> Name | None:
        """Return what a name stands for in the innermost scope that has it."""
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)


class Program:
    """A kernel, ready to be translated.

    Args:
        module: what the PTX text defines.
        entry: the kernel.

    Attributes:
        blocks: the instructions of each basic block; `insts` has all of them.
        labels: the number of the block that follows each label.
        targets: the labels of each branch table.
        registers: number of registers of each class.
        static_smem, local_bytes, param_bytes: bytes of each memory.
        globals: the variables of the module that are global or constant.

    Raises:
        PtxError: something is not emulated.
    """

    def __init__(self, module: Module, entry: Function) -> None:
        self.module, self.entry = module, entry
        self.registers = {"p": 0, "h": 0, "r": 0, "q": 0}
        self.insts: list[Instruction] = []
        self.blocks: list[list[Instruction]] = [[]]
        self.labels: dict[str, int] = {}
        self.targets: dict[str, list[str]] = {}
        self.static_smem = self.local_bytes = 0
        self.globals: list[Variable] = []
        self._once: dict[tuple[str, str], Symbol] = {}
        self._calls, self._last_label = 0, ""
        self.module_names: Scope = {v.name: self._place(v) for v in module.variables}
        params: Scope = {p.name: Symbol("param", p.offset) for p in entry.params}
        self.param_bytes = max([p.offset + p.size for p in entry.params], default=0)
        self._expand(entry, {**self.module_names, **params}, "", None, [entry.name])
        self.blocks.append([])  # a program that runs off the end comes here; never executed after ret

    def _place(self, v: Variable) -> Symbol:
        if v.space == "dynamic":
            return Symbol("dynamic", 0)
        if v.space == "shared":
            at = align_up(self.static_smem, v.align)
            self.static_smem = at + v.size
            return Symbol("shared", at)
        if v.space in ("local", "param"):  # the parameters of a call live in the local memory of each lane
            at = align_up(self.local_bytes, max(v.align, 8))
            self.local_bytes = at + v.size
            return Symbol("local", at)
        self.globals.append(v)
        return Symbol(v.space, len(self.globals) - 1)

    def _expand(self, function: Function, names: Scope, prefix: str, end: str | None, stack: Sequence[str]) -> None:
        statements = function.statements or []
        frame = _Frame(function, [names, {}], _Labels(statements, prefix), end, stack)
        for s in statements:
            if s.kind == "open":
                frame.scopes.append({})
                frame.labels.open()
            elif s.kind == "close":
                frame.scopes.pop()
                frame.labels.close()
            elif s.kind == "label":
                self._label(frame.labels.resolve(s.text))
            else:
                try:
                    self._statement(s, frame)
                except PtxError as error:
                    if "PTX line" in str(error):
                        raise
                    raise PtxError(f"PTX line {s.line} ({s.source}): {error}") from None

    def _label(self, name: str) -> None:
        if self.blocks[-1]:
            self.blocks.append([])
        self.labels[name] = len(self.blocks) - 1
        self._last_label = name

    def _statement(self, s: Statement, frame: _Frame) -> None:
        text = s.text
        if text.startswith(".reg"):
            self._declare_registers(text, frame.scopes[-1])
        elif re.match(r"(\.\w+\s+)*\.(shared|local|global|const|param)\b", text):
            v = parse_variable(text)
            key = (frame.function.name, v.name)
            if v.space in ("shared", "global", "const") and key not in self._once:  # one copy, however often inlined
                self._once[key] = self._place(v)
            frame.scopes[-1][v.name] = self._once.get(key) or self._place(v)
        elif text.startswith(".branchtargets"):
            names = text.split(None, 1)[1].split(",")
            self.targets[self._last_label] = [frame.labels.resolve(each.strip()) for each in names]
        else:
            found = re.match(r"(?:@(!?)([%\w$.]+)\s+)?([a-z_][\w.:]*)\s*(.*)$", text)
            if not found:
                raise PtxError(f"statement not understood: {text}")
            guard = frame.lookup(found[2]) if found[2] else None
            if found[2] and not isinstance(guard, Register):
                raise PtxError(f"unknown predicate {found[2]}")
            args = split_operands(found[4])
            looked_up = {name: frame.lookup(name) for name in NAME.findall(" ".join(args))}
            known = {name: named for name, named in looked_up.items() if named is not None}
            under = guard if isinstance(guard, Register) else None
            inst = Instruction(found[3], args, under, bool(found[1]), known, text, s.line, s.source)
            self._instruction(inst, frame)

    def _declare_registers(self, text: str, scope: Scope) -> None:
        found = re.match(r"\.reg\s*\.(\w+)\s+(.*)", text)
        if found is None or found[1] not in REGISTER_CLASS:
            raise PtxError(f"registers of this type are not emulated: {text}")
        cls = REGISTER_CLASS[found[1]]
        for each in found[2].split(","):
            many = re.match(r"(.+)<(\d+)>$", each.strip())
            for name in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [each.strip()]:
                scope[name] = Register(cls, self.registers[cls])
                self.registers[cls] += 1

    def _instruction(self, inst: Instruction, frame: _Frame) -> None:
        root = inst.op.split(".")[0]
        if root == "call":
            self._call(inst, frame)
            return
        if root == "ret" and frame.end:
            inst = replace(inst, op="bra", args=[frame.end])
        elif root in ("bra", "brx"):
            inst.args[-1] = frame.labels.resolve(inst.args[-1])
        self._add(inst)
        parts = inst.op.split(".")
        if root in ("bar", "barrier") and "red" in parts:  # the result is read when the barrier has been passed
            self._add(replace(inst, op=".".join(["barrier_result", *parts[parts.index("red") + 1 :]])))

    def _add(self, inst: Instruction) -> None:
        inst.index = len(self.insts)
        self.insts.append(inst)
        self.blocks[-1].append(inst)
        if ENDS_BLOCK.match(inst.op):
            self.blocks.append([])

    def _call(self, inst: Instruction, frame: _Frame) -> None:
        results, name, actual, rest = _parts_of_call(inst.args)
        callee = self.module.functions.get(name)
        if rest or callee is None or name.startswith("%"):
            raise inst.unsupported("call through a pointer is not emulated")
        if name == "__assertfail":
            inst.op, inst.args = name, actual
            self._add(inst)
            return
        if callee.statements is None:
            printf = name == "vprintf"
            raise inst.unsupported(
                "device printf is not emulated" if printf else f"the body of {name} is not in this PTX"
            )
        if name in frame.stack or len(frame.stack) > MAX_CALL_DEPTH:
            raise inst.unsupported("recursion is not emulated")
        formal, given = callee.params + callee.returns, [frame.lookup(x) for x in actual + results]
        bound = {each.name: value for each, value in zip(formal, given, strict=False) if value is not None}
        counts = (len(actual), len(results), len(bound))
        if counts != (len(callee.params), len(callee.returns), len(formal)):
            raise inst.unsupported("the arguments do not fit the function")
        self._calls += 1
        prefix = f"call{self._calls}/"
        end = prefix + "end"
        if inst.guard:
            self._add(replace(inst, op="bra", args=[end], negated=not inst.negated))
        self._expand(callee, {**self.module_names, **bound}, prefix, end, [*frame.stack, name])
        self._label(end)


def _parts_of_call(args: Sequence[str]) -> tuple[list[str], str, list[str], list[str]]:
    """Return the results, the name, the arguments, and what is left of a call's operands."""
    left = list(args)

    def group() -> list[str]:
        if not left or not left[0].startswith("("):
            return []
        return [x.strip() for x in left.pop(0)[1:-1].split(",") if x.strip()]

    results = group()
    name = left.pop(0)
    return results, name, group(), left


class _Labels:
    """Resolve labels. A label belongs to the braces around it, since inline assembly may repeat a name."""

    def __init__(self, statements: Sequence[Statement], prefix: str) -> None:
        self.prefix, self.count = prefix, 0
        self.declared: dict[int, set[str]] = {0: set()}
        path = [0]
        for s in statements:
            if s.kind == "open":
                path.append(len(self.declared))
                self.declared[path[-1]] = set()
            elif s.kind == "close":
                path.pop()
            elif s.kind == "label":
                self.declared[path[-1]].add(s.text)
        self.path = [0]

    def open(self) -> None:
        """Step into a brace."""
        self.count += 1
        self.path.append(self.count)

    def close(self) -> None:
        """Step out of a brace."""
        self.path.pop()

    def resolve(self, name: str) -> str:
        """Return the unique name of a label.

        Raises:
            PtxError: no enclosing brace has the label.
        """
        for i in reversed(self.path):
            if name in self.declared[i]:
                return f"{self.prefix}{i}/{name}"
        raise PtxError(f"unknown label {name}")
