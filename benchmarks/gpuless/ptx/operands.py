"""Operands as C++ expressions. `w` is the warp, `l` the lane, `m` the mask of active lanes."""

from __future__ import annotations

import re

from oner_fast.benchmarks.gpuless.ptx.parse import SIZES
from oner_fast.benchmarks.gpuless.ptx.program import Instruction, Register, Symbol

CTYPE = {
    "b8": "u8", "u8": "u8", "s8": "s8", "b16": "u16", "u16": "u16", "s16": "s16", "f16": "u16", "bf16": "u16",
    "b32": "u32", "u32": "u32", "s32": "s32", "f32": "u32", "f16x2": "u32", "bf16x2": "u32", "tf32": "u32",
    "b64": "u64", "u64": "u64", "s64": "s64", "f64": "u64", "pred": "u32",
}  # fmt: skip
FLOATS = ("f16", "bf16", "f32", "f64")
UNPACK = {"f16": "H", "bf16": "BF", "f32": "F", "f64": "D"}  # bits to value
PACK = {"f16": "UH", "bf16": "UBF", "f32": "U", "f64": "UD"}  # value to bits
VALUE = {"f16": "f32", "bf16": "f32", "f32": "f32", "f64": "f64"}  # the C++ type that computes
SPECIAL = {
    "%laneid": "(u32)l",
    "%warpid": "(u32)w->id",
    "%nwarpid": "((w->c->ntid[0] * w->c->ntid[1] * w->c->ntid[2] + 31) / 32)",
    "%lanemask_eq": "(1u << l)",
    "%lanemask_lt": "((1u << l) - 1)",
    "%lanemask_le": "((2u << l) - 1)",
    "%lanemask_gt": "~((2u << l) - 1)",
    "%lanemask_ge": "~((1u << l) - 1)",
    "%clock": "0u",
    "%clock64": "0ull",
    "%globaltimer": "0ull",
    "%smid": "0u",
    "%nsmid": "1u",
    "%gridid": "0ull",
    "%dynamic_smem_size": "w->c->dyn_bytes",
    "%total_smem_size": "w->c->smem_bytes",
    "WARP_SZ": "32u",
}


def bits_type(ty: str) -> str:
    """Return the untyped register type of the same size."""
    return f"b{8 * SIZES[ty]}" if ty in FLOATS or ty.endswith("x2") else ty


def immediate(x: str, ty: str) -> str | None:
    """Return a literal as a C++ expression of a type, or None where the operand is not a literal."""
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", x):
        return f"F(0x{found[1]}u)" if ty == "f32" else f"0x{found[1]}u" if SIZES[ty] == 4 else None
    if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", x):
        return f"D(0x{found[1]}ull)" if ty == "f64" else f"0x{found[1]}ull"
    found = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", x)
    if not found:
        return None
    bits = 8 * SIZES[ty]
    value = int(found[2], 0) * (-1 if found[1] else 1) & ((1 << bits) - 1)
    if ty == "pred":
        return "1" if value else "0"
    if ty in FLOATS:
        return f"{UNPACK[ty]}((u{bits}){value}ull)"
    return f"(s{bits}){value}ull" if ty[0] == "s" else f"(u{bits}){value}ull"


def special(x: str) -> str | None:
    """Return a special register as a C++ expression, or None where the operand is not a special register."""
    found = re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.([xyz])", x)
    if not found:
        return SPECIAL.get(x)
    i = "xyz".index(found[2])
    return f"w->tid[{i}][l]" if found[1] == "tid" else f"w->c->{found[1]}[{i}]"


def lane(register: Register) -> str:
    """Return a register of one lane."""
    return f"w->{register.cls}[{register.index}][l]"


def array(inst: Instruction, x: str) -> str:
    """Return all 32 lanes of a register.

    Raises:
        PtxError: the operand is `_` or a literal, not a register.
    """
    register = inst.names.get(x)
    if not isinstance(register, Register):
        raise inst.unsupported(f"operand {x} is not a register")
    return f"w->{register.cls}[{register.index}]"


def symbol(s: Symbol) -> str:
    """Return the address of a variable; in shared memory and among parameters, an address is an offset."""
    places = {
        "shared": f"{s.offset}u",
        "dynamic": "w->c->dyn_offset",
        "local": f"((u64)w->local[l] + {s.offset})",
        "param": f"{s.offset}u",
    }
    return places.get(s.space, f"(u64)g_global[{s.offset}]")


def source(inst: Instruction, x: str, ty: str) -> str:
    """Return operand x, read as a type.

    Raises:
        PtxError: the operand is not understood.
    """
    known = inst.names.get(x)
    if isinstance(known, Register):
        value = lane(known)
        if ty == "pred":
            return value
        return f"{UNPACK[ty]}((u{8 * SIZES[ty]}){value})" if ty in FLOATS else f"({CTYPE[ty]}){value}"
    named = symbol(known) if isinstance(known, Symbol) else special(x)
    if named is not None:
        return f"({CTYPE[ty]})({named})"
    literal = immediate(x, ty)
    if literal is None:
        raise inst.unsupported(f"operand {x} not understood")
    return literal


def predicate(inst: Instruction, x: str) -> str:
    """Return a predicate operand, which may be negated, as 0 or 1."""
    return f"!{source(inst, x[1:], 'pred')}" if x.startswith("!") else f"!!{source(inst, x, 'pred')}"


def assign(inst: Instruction, x: str, ty: str, value: str) -> str:
    """Return the statement that stores a value of a type in operand x; wider registers are sign or zero extended.

    Raises:
        PtxError: the operand is no register.
    """
    if x == "_":
        return f"(void)({value});"
    register = inst.names.get(x)
    if not isinstance(register, Register):
        raise inst.unsupported(f"destination {x} not understood")
    if ty == "pred":
        return f"{lane(register)} = ({value}) ? 1 : 0;"
    if ty in FLOATS:
        return f"{lane(register)} = {PACK[ty]}({value});"
    wide = f"(s64)(s{8 * SIZES[ty]})" if ty[0] == "s" else f"(u{8 * SIZES[ty]})"
    return f"{lane(register)} = {wide}({value});"


def address(inst: Instruction, x: str, shared: bool = False) -> str:
    """Return `[base + offset]` as a C++ address; shared memory is addressed by offset.

    Raises:
        PtxError: the address is not understood.
    """
    found = re.fullmatch(r"\[\s*([^+\s\]]+)\s*(?:\+\s*(-?(?:0[xX][0-9a-fA-F]+|\d+)))?\s*\]", x)
    if not found:
        raise inst.unsupported(f"address {x} not understood")
    base, offset = source(inst, found[1], "u32" if shared else "u64"), int(found[2] or "0", 0)
    return f"(u32)({base} + {offset & 0xFFFFFFFF}u)" if shared else f"(u64)({base} + (u64){offset}ll)"


def base_symbol(inst: Instruction, x: str) -> Symbol | None:
    """Return the variable that an address names, if it names one."""
    named = inst.names.get(re.split(r"[\[\]+\s]+", x.strip())[1])
    return named if isinstance(named, Symbol) else None
