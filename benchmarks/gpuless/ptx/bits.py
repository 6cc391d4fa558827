"""Translate logic, shifts and other work on bits."""

from __future__ import annotations

from oner_fast.benchmarks.gpuless.ptx.decoded import Decoded, handles
from oner_fast.benchmarks.gpuless.ptx.operands import CTYPE

LOGIC = {"and": "&", "or": "|", "xor": "^"}


@handles(" ".join(LOGIC))
def logic(o: Decoded) -> str:
    """Combine two operands bit by bit."""
    return o.every_lane(f"({o.src(1)} {LOGIC[o.root]} {o.src(2)})")


@handles("not cnot")
def invert(o: Decoded) -> str:
    """Invert every bit (`not`), or map 0 to 1 and any other number to 0 (`cnot`)."""
    return o.every_lane(f"({o.src(1)} == 0)" if o.root == "cnot" or o.ty == "pred" else f"(~{o.src(1)})")


@handles("shl shr")
def shift(o: Decoded) -> str:
    """Shift; a signed number keeps its sign when it is shifted to the right."""
    ty = CTYPE[o.ty] if o.root == "shr" else f"u{o.bits}"
    return o.every_lane(f"{o.root}<{ty}>({o.src(1)}, {o.src(2, 'u32')})")


@handles("shf", "l r clamp wrap")
def funnel_shift(o: Decoded) -> str:
    """Shift two registers as one, and keep one half."""
    count = f"({o.src(3, 'u32')} & 31)" if o.has("wrap") else f"std::min(32u, {o.src(3, 'u32')})"
    both = f"((u64){o.src(2, 'u32')} << 32 | {o.src(1, 'u32')})"
    return o.every_lane(f"(u32)(({both} << {count}) >> 32)" if o.has("l") else f"(u32)({both} >> {count})")


@handles("bfe")
def bit_field_extract(o: Decoded) -> str:
    """Take a range of bits out of a register."""
    return o.every_lane(f"bfe<{CTYPE[o.ty]}>({o.src(1)}, {o.src(2, 'u32')}, {o.src(3, 'u32')})")


@handles("bfi")
def bit_field_insert(o: Decoded) -> str:
    """Put bits into a range of a register."""
    return o.every_lane(f"bfi<u{o.bits}>({o.src(1)}, {o.src(2)}, {o.src(3, 'u32')}, {o.src(4, 'u32')})")


@handles("brev clz bfind popc")
def bit_count(o: Decoded) -> str:
    """Reverse, find or count bits."""
    if o.root == "brev":
        return o.every_lane(f"brev<u{o.bits}>({o.src(1)})")
    function = {"clz": f"clz<u{o.bits}>", "bfind": f"bfind<{CTYPE[o.ty]}>", "popc": "__builtin_popcountll"}[o.root]
    return o.every_lane(f"{function}({o.src(1)})", "u32")


@handles("prmt lop3")
def byte_select(o: Decoded) -> str:
    """Choose bytes from two registers (`prmt`), or combine the bits of three by a truth table (`lop3`)."""
    return o.every_lane(f"{o.root}({', '.join(o.src(i, 'u32') for i in range(1, len(o.args)))})", "b32")
