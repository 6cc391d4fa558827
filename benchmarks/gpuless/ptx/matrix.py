"""Translate matrix instructions: ldmatrix, mma, wmma."""

from __future__ import annotations

import re

from oner_fast.benchmarks.gpuless.ptx.accesses import space
from oner_fast.benchmarks.gpuless.ptx.decoded import Decoded, handles
from oner_fast.benchmarks.gpuless.ptx.operands import address, array, source
from oner_fast.benchmarks.gpuless.ptx.parse import SIZES, split_operands

# (shape, element type) to K, for the element types that have the shape on sm_80.
MMA_SHAPES = {
    ("m16n8k8", "f16"): 8,
    ("m16n8k16", "f16"): 16,
    ("m16n8k8", "bf16"): 8,
    ("m16n8k16", "bf16"): 16,
    ("m16n8k4", "tf32"): 4,
    ("m16n8k8", "tf32"): 8,
    ("m16n8k16", "s8"): 16,
    ("m16n8k32", "s8"): 32,
    ("m16n8k16", "u8"): 16,
    ("m16n8k32", "u8"): 32,
}
SHAPES = ("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32", "m8n8k4")
HALF_SUMS = "f16 accumulators are not emulated in wmma"


def registers(o: Decoded, i: int, most: int | None = None) -> str:
    """Return operand i, a list of registers, as C++ arrays; literals read zeros."""
    each = split_operands(o.args[i][1:-1])[:most]
    return ", ".join("g_zero" if re.fullmatch(r"0[fF]0+|0", x) else array(o.inst, x) for x in each)


@handles("ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta")
def load_matrix(o: Decoded) -> str:
    """Load matrices of 8 x 8 from shared memory."""
    count, transposed = len(split_operands(o.args[0][1:-1])), str(o.has("trans")).lower()
    site = o.new_site("shared_ld")
    return (
        f"{{ u32 a_[32]; for (int l = 0; l < 32; l++) a_[l] = {address(o.inst, o.args[1], True)}; "
        f"u32* d_[] = {{{registers(o, 0)}}}; require_full_warp({o.inst.index}, w, m); "
        f"ldmatrix({o.inst.index}, {site}, w, d_, a_, {count}, {transposed}); }}"
    )


@handles("mma", "sync aligned row col satfinite " + " ".join(SHAPES))
def mma(o: Decoded) -> str:
    """Multiply matrices and add."""
    shape, types = o.one_of(SHAPES), o.types
    d, a, b, c = (registers(o, i) for i in range(4))
    ty = "u64" if types[0] == "f64" else "u32"
    arrays = (
        f"{{ require_full_warp({o.inst.index}, w, m); {ty}* d_[] = {{{d}}}; const {ty}* a_[] = {{{a}}}; "
        f"const {ty}* b_[] = {{{b}}}; const {ty}* c_[] = {{{c}}}; "
    )
    if (shape, types[0]) == ("m8n8k4", "f64"):
        return arrays + "mma_f64(d_, a_[0], b_[0], c_); }"
    depth = MMA_SHAPES.get((shape, types[1]))
    if depth is None or types[0] not in ("f32", "s32", "f16") or types[0] != types[3]:
        raise o.unsupported()
    sums = f"ACC_{types[0].upper()}" + ("_SAT" if o.has("satfinite") else "")
    return arrays + f"mma(E_{types[1].upper()}, E_{types[2].upper()}, {sums}, {depth}, d_, a_, b_, c_); }}"


@handles("wmma", "load store mma a b c d sync aligned row col m16n16k16 shared shared::cta global")
def wmma(o: Decoded) -> str:
    """Load, store or multiply matrices of 16 x 16, whose layout in registers is the emulator's own."""
    if not o.has("m16n16k16"):
        raise o.unsupported()
    if o.mods[0] == "mma":
        return wmma_product(o)
    load = o.mods[0] == "load"
    list_at, addr_at = (0, 1) if load else (1, 0)
    size, shared = SIZES[o.ty], space(o) == "shared"
    if o.mods[1] in "cd" and size != 4:
        raise o.unsupported(HALF_SUMS)
    stride = source(o.inst, o.args[2], "u32") if len(o.args) > 2 else "16u"
    site = o.new_site("global_ld" if load else "global_st")
    o.new_site("shared_ld" if load else "shared_st")
    given = f"{address(o.inst, o.args[addr_at], shared)}, {stride}, {str(shared).lower()}, {str(o.has('row')).lower()}"
    return (
        f"{{ require_full_warp({o.inst.index}, w, m); const int l = 0; "
        f"{'' if load else 'const '}u32* r_[] = {{{registers(o, list_at, 8 if size == 4 else 4)}}}; "
        f"wmma_{o.mods[0]}({o.inst.index}, {site}, w, {given}, {size}, r_); }}"
    )


def wmma_product(o: Decoded) -> str:
    """Multiply matrices of 16 x 16 and add."""
    if "f16" in (o.types[0], o.types[-1]):
        raise o.unsupported(HALF_SUMS)
    half = "BF16" if "bf16" in o.types else "F16"
    return (
        f"{{ require_full_warp({o.inst.index}, w, m); u32* d_[] = {{{registers(o, 0, 8)}}}; "
        f"const u32* a_[] = {{{registers(o, 1, 4)}}}; const u32* b_[] = {{{registers(o, 2, 4)}}}; "
        f"const u32* c_[] = {{{registers(o, 3, 8)}}}; wmma_mma(E_{half}, d_, a_, b_, c_); }}"
    )
