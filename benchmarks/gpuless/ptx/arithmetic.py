"""Translate moves and arithmetic, of floating-point numbers and of integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oner_fast.benchmarks.gpuless.ptx.decoded import Decoded, handles
from oner_fast.benchmarks.gpuless.ptx.operands import CTYPE, FLOATS, PACK, UNPACK, VALUE, assign, bits_type, source
from oner_fast.benchmarks.gpuless.ptx.parse import split_operands

DIRECTED = ("rz", "rm", "rp")
FLOAT_OPS = {
    "add": "({} + {})",
    "sub": "({} - {})",
    "mul": "({} * {})",
    "div": "({} / {})",
    "fma": "std::fma({}, {}, {})",
    "mad": "std::fma({}, {}, {})",
    "neg": "(-{})",
    "abs": "std::fabs({})",
}
EXACT_OPS = {"add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "fma": "{} * {} + {}", "mad": "{} * {} + {}"}
UNARY = {
    "ex2": "std::exp2({})",
    "lg2": "std::log2({})",
    "sqrt": "std::sqrt({})",
    "rsqrt": "(1 / std::sqrt({}))",
    "rcp": "(1 / {})",
    "sin": "std::sin({})",
    "cos": "std::cos({})",
    "tanh": "std::tanh({})",
}


def flushed(o: Decoded, value: str, ty: str = "") -> str:
    """Return a value, with subnormal numbers flushed to zero where the instruction says so."""
    return f"ftz({value})" if o.has("ftz") and (ty or o.ty) == "f32" else value


def halves(o: Decoded, expression: Callable[[Sequence[str]], str]) -> str:
    """Apply `expression`, a function of the operands' values, to both halves of f16x2 or bf16x2."""
    ty = o.ty[:-2]
    parts = []
    for shift in (0, 16):
        values = [f"{UNPACK[ty]}((u16)({o.src(i, 'b32')} >> {shift}))" for i in range(1, len(o.args))]
        parts.append(f"((u32){PACK[ty]}({expression(values)}) << {shift})")
    return o.every_lane(" | ".join(parts), "b32")


@handles("mov")
def mov(o: Decoded) -> str:
    """Copy, split one register into several, or join several in one."""
    to, given = o.args
    if to.startswith("{"):
        parts = split_operands(to[1:-1])
        width = o.bits // len(parts)
        split = [assign(o.inst, each, f"u{width}", f"t_ >> {width * i}") for i, each in enumerate(parts)]
        return f"LN {{ u{o.bits} t_ = {o.src(1, f'u{o.bits}')}; {' '.join(split)} }}"
    if given.startswith("{"):
        parts = split_operands(given[1:-1])
        width = o.bits // len(parts)
        joined = [f"((u{o.bits}){source(o.inst, s, f'u{width}')} << {width * i})" for i, s in enumerate(parts)]
        return o.every_lane(" | ".join(joined), f"u{o.bits}")
    ty = bits_type(o.ty)
    return o.every_lane(o.src(1, ty), ty)


@handles("add sub mul mad fma div min max neg abs", "rn rz rm rp ftz sat cc lo hi wide approx full NaN noftz")
def arithmetic(o: Decoded) -> str:
    """Compute with one to three numbers."""
    if o.ty in ("f16x2", "bf16x2"):
        return halves(o, lambda values: float_op(o, values, "f32"))
    if o.ty in FLOATS:
        given = [flushed(o, o.src(i)) for i in range(1, len(o.args))]
        return o.every_lane(flushed(o, float_op(o, given, o.ty)))
    if o.has("sat", "rn", "rz", "rm", "rp"):
        raise o.unsupported()
    return integer_op(o)


def float_op(o: Decoded, values: Sequence[str], ty: str) -> str:
    """Return the value of a floating-point operation."""
    if mode := o.one_of(DIRECTED):
        if ty != "f32" or o.root not in EXACT_OPS:
            raise o.unsupported(f"rounding .{mode} is not emulated here")
        result = f"round_{mode}({EXACT_OPS[o.root].format(*[f'(f64){x}' for x in values])})"
    elif o.root in ("min", "max"):
        if len(values) != 2:
            raise o.unsupported()
        result = f"{o.root}_{'nan' if o.has('NaN') else 'num'}<{VALUE[ty]}>({values[0]}, {values[1]})"
    else:
        result = FLOAT_OPS[o.root].format(*values)
    return f"sat({result})" if o.has("sat") else result


@handles(" ".join(UNARY), "approx ftz rn full")
def unary_function(o: Decoded) -> str:
    """Compute ex2, rcp, tanh and the like by the C library, which is more accurate than a GPU's approximations."""
    if o.ty in ("f16x2", "bf16x2"):
        return halves(o, lambda values: UNARY[o.root].format(values[0]))
    return o.every_lane(flushed(o, UNARY[o.root].format(flushed(o, o.src(1)))))


@handles("copysign")
def copysign(o: Decoded) -> str:
    """Give one number the sign of another."""
    return o.every_lane(f"std::copysign({o.src(2)}, {o.src(1)})")


def integer_op(o: Decoded) -> str:
    """Compute with integers."""
    u, c = f"u{o.bits}", CTYPE[o.ty]
    if o.root in ("add", "sub"):
        sign = "+" if o.root == "add" else "-"
        return carry(o, sign, "0") if o.has("cc") else o.every_lane(f"(({u}){o.src(1)} {sign} ({u}){o.src(2)})")
    if o.root in ("mul", "mad"):
        return product(o)
    a = o.src(1)
    if o.root == "neg":
        return o.every_lane(f"({u})(0 - ({u}){a})")
    if o.root == "abs":
        return o.every_lane(f"({a} < 0 ? ({u})(0 - ({u}){a}) : ({u}){a})")
    b = o.src(2)
    if o.root == "div":
        overflow = f"{b} == ({c})-1 && {int(o.ty[0] == 's')} ? ({c})(0 - ({u}){a})"
        return o.every_lane(f"({b} == 0 ? ({c})-1 : {overflow} : ({c})({a} / {b}))")
    return o.every_lane(f"std::{o.root}<{c}>({a}, {b})")


def product(o: Decoded) -> str:
    """Multiply integers, and add a third to the low, the high or the whole product."""
    if o.has("cc"):
        raise o.unsupported()
    signed, u = o.ty[0] == "s", f"u{max(32, o.bits)}"
    if o.bits < 64:
        wide = ("s" if signed else "u") + str(2 * o.bits)
    else:
        wide = "__int128" if signed else "unsigned __int128"
    full = f"(({wide})({o.src(1)}) * ({wide})({o.src(2)}))"
    if o.has("wide"):
        ty = f"{o.ty[0]}{2 * o.bits}"
        return o.every_lane(full if o.root == "mul" else f"((u{2 * o.bits}){full} + (u{2 * o.bits}){o.src(3, ty)})", ty)
    low = f"(({u}){o.src(1)} * ({u}){o.src(2)})"
    part = f"(u{o.bits})({full} >> {o.bits})" if o.has("hi") else low
    return o.every_lane(part if o.root == "mul" else f"({part} + (u{o.bits}){o.src(3)})")


def carry(o: Decoded, sign: str, carry_in: str) -> str:
    """Add or subtract 32-bit integers, and keep the carry."""
    if o.size != 4:
        raise o.unsupported("64-bit carry is not emulated")
    sum_ = f"(u64){o.src(1, 'u32')} {sign} (u64){o.src(2, 'u32')} {sign} {carry_in}"
    return f"LN {{ u64 z_ = {sum_}; {o.dst('(u32)z_', 'u32')} w->carry[l] = (u32)(z_ >> 32) & 1; }}"


@handles("addc subc", "cc")
def with_carry(o: Decoded) -> str:
    """Add or subtract with the carry of the instruction before."""
    return carry(o, "+" if o.root == "addc" else "-", "w->carry[l]")


@handles("rem")
def remainder(o: Decoded) -> str:
    """Compute the remainder of an integer division."""
    a, b, c = o.src(1), o.src(2), CTYPE[o.ty]
    return o.every_lane(f"({b} == 0 ? {a} : {b} == ({c})-1 && {int(o.ty[0] == 's')} ? 0 : {a} % {b})")


@handles("sad")
def sum_of_difference(o: Decoded) -> str:
    """Add the absolute difference of two integers to a third."""
    a, b, u = o.src(1), o.src(2), f"u{o.bits}"
    return o.every_lane(f"(({a} < {b} ? ({u}){b} - ({u}){a} : ({u}){a} - ({u}){b}) + ({u}){o.src(3)})")
