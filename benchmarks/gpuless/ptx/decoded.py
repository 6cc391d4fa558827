"""A decoded instruction, and the table of the functions that translate it to C++."""

from __future__ import annotations

from collections.abc import Callable, Collection

from oner_fast.benchmarks.gpuless.ptx import operands
from oner_fast.benchmarks.gpuless.ptx.parse import SIZES, PtxError
from oner_fast.benchmarks.gpuless.ptx.program import Instruction

NewSite = Callable[[str], int]


class Decoded:
    """One instruction, `root.modifiers`, with its types, and its operands as C++.

    Args:
        instruction: as it stands in the program.
        new_site: takes the kind of a counted memory access and returns its number.
    """

    def __init__(self, instruction: Instruction, new_site: NewSite) -> None:
        self.inst, self.new_site = instruction, new_site
        self.root, *self.mods = instruction.op.split(".")
        self.types = [each for each in self.mods if each in SIZES]
        self.ty = self.types[-1] if self.types else ""
        self.size = SIZES.get(self.ty, 0)
        self.bits = 8 * self.size
        self.args = instruction.args

    def has(self, *mods: str) -> bool:
        """Whether one of the modifiers is there."""
        return any(each in self.mods for each in mods)

    def one_of(self, choices: Collection[str]) -> str:
        """Return the first modifier that is among the choices, or an empty text."""
        return next((each for each in self.mods if each in choices), "")

    def src(self, i: int, ty: str = "") -> str:
        """Return operand i, read as the given type or, by default, as the instruction's own."""
        return operands.source(self.inst, self.args[i], ty or self.ty)

    def dst(self, value: str, ty: str = "", i: int = 0) -> str:
        """Return the statement that stores a value in operand i."""
        return operands.assign(self.inst, self.args[i], ty or self.ty, value)

    def every_lane(self, value: str, ty: str = "") -> str:
        """Return the whole instruction: each active lane assigns `value` to operand 0."""
        return "LN " + self.dst(value, ty)

    def unsupported(self, why: str = "not emulated") -> PtxError:
        """Return the error that says where and why the instruction cannot be translated."""
        return self.inst.unsupported(why)


Translator = Callable[[Decoded], str]
TRANSLATORS: dict[str, tuple[Translator, frozenset[str]]] = {}


def handles(names: str, modifiers: str = "") -> Callable[[Translator], Translator]:
    """Register a translator of the instructions named.

    A modifier that is not listed makes the instruction unsupported, so that nothing is skipped silently.
    """

    def register(translator: Translator) -> Translator:
        TRANSLATORS.update({name: (translator, frozenset(modifiers.split())) for name in names.split()})
        return translator

    return register


def translate(instruction: Instruction, new_site: NewSite) -> str:
    """Return the C++ of one instruction.

    Raises:
        PtxError: the instruction, or one of its modifiers, is not emulated.
    """
    o = Decoded(instruction, new_site)
    if o.root not in TRANSLATORS:
        raise o.unsupported()
    translator, allowed = TRANSLATORS[o.root]
    strange = [m for m in o.mods if m not in SIZES and m not in allowed and m.split("::")[0] + "::*" not in allowed]
    if strange:
        raise o.unsupported(f"modifier .{strange[0]} is not emulated")
    return translator(o)
