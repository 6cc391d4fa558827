"""Translate comparisons and choices."""

from __future__ import annotations

from oner_fast.benchmarks.gpuless.ptx.arithmetic import flushed
from oner_fast.benchmarks.gpuless.ptx.decoded import Decoded, handles
from oner_fast.benchmarks.gpuless.ptx.operands import FLOATS, assign, bits_type, predicate

SIGNS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
COMPARISONS = (*SIGNS, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
COMBINE = {"and": "&", "or": "|", "xor": "^"}
MODIFIERS = " ".join((*COMPARISONS, "ftz", *COMBINE))
PROPERTIES = {
    "finite": "std::isfinite({})",
    "infinite": "std::isinf({})",
    "number": "!std::isnan({})",
    "notanumber": "std::isnan({})",
    "normal": "std::isnormal({})",
    "subnormal": "(std::fpclassify({}) == FP_SUBNORMAL)",
}


def comparison(o: Decoded, ty: str) -> str:
    """Return the test of operands 1 and 2, read as a type. `equ` and the like are true where an operand is NaN."""
    op = o.one_of(COMPARISONS)
    x, y = flushed(o, o.src(1, ty), ty), flushed(o, o.src(2, ty), ty)
    nan = f"({x} != {x} || {y} != {y})"
    if op in ("num", "nan"):
        return nan if op == "nan" else f"!{nan}"
    if op == "ne" and ty in FLOATS:
        return f"({x} < {y} || {x} > {y})"  # ordered
    return f"({x} {SIGNS[op]} {y})" if op in SIGNS else f"(({x} {SIGNS[op[:-1]]} {y}) || {nan})"


@handles("setp", MODIFIERS)
def set_predicate(o: Decoded) -> str:
    """Set one predicate to a test, and another to its opposite."""
    if o.ty.endswith("x2"):
        raise o.unsupported()
    test, opposite = "e_", "!e_"
    if combine := o.one_of(COMBINE):
        other = predicate(o.inst, o.args[3])
        test, opposite = f"(e_ {COMBINE[combine]} ({other}))", f"(!e_ {COMBINE[combine]} ({other}))"
    targets = zip(o.args[0].split("|"), ("a_", "b_"), strict=False)
    assigned = " ".join(assign(o.inst, target, "pred", value) for target, value in targets)
    return f"LN {{ bool e_ = {comparison(o, o.ty)}; bool a_ = {test}, b_ = {opposite}; (void)b_; {assigned} }}"


@handles("set", MODIFIERS)
def set_value(o: Decoded) -> str:
    """Set a register to all ones, or to 1.0, where a test holds, and to 0 elsewhere."""
    if o.has(*COMBINE) or o.types[0] not in ("f32", "u32", "s32"):
        raise o.unsupported()
    values = "1.f : 0.f" if o.types[0] == "f32" else "~0u : 0u"
    return o.every_lane(f"({comparison(o, o.types[1])} ? {values})", o.types[0])


@handles("selp")
def select(o: Decoded) -> str:
    """Choose between two operands by a predicate."""
    ty = bits_type(o.ty)
    return o.every_lane(f"({o.src(3, 'pred')} ? {o.src(1, ty)} : {o.src(2, ty)})", ty)


@handles("slct", "ftz")
def select_by_sign(o: Decoded) -> str:
    """Choose between two operands by the sign of a third."""
    ty = bits_type(o.types[0])
    return o.every_lane(f"({o.src(3, o.types[1])} >= 0 ? {o.src(1, ty)} : {o.src(2, ty)})", ty)


@handles("testp", " ".join(PROPERTIES))
def test_property(o: Decoded) -> str:
    """Test a property of a floating-point number."""
    return o.every_lane(PROPERTIES[o.mods[0]].format(o.src(1)), "pred")
