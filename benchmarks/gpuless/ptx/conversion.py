"""Translate conversions between types."""

from __future__ import annotations

from oner_fast.benchmarks.gpuless.ptx.arithmetic import DIRECTED, flushed
from oner_fast.benchmarks.gpuless.ptx.decoded import Decoded, handles
from oner_fast.benchmarks.gpuless.ptx.operands import CTYPE, FLOATS, PACK, VALUE

INTEGRAL = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
MODES = ("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")
NOT_EMULATED = "this rounding is not emulated"


@handles("cvt", " ".join(MODES) + " ftz sat relu")
def convert(o: Decoded) -> str:
    """Convert a number, or two into a pair."""
    to, given = o.types
    mode = o.one_of(MODES)
    if to in ("f16x2", "bf16x2"):
        return convert_pair(o, to, mode)
    if o.has("relu") or (mode in DIRECTED and (to, given, mode) != ("bf16", "f32", "rz")):
        raise o.unsupported(NOT_EMULATED)
    x = flushed(o, o.src(1, given), given)
    if to == "tf32":
        return o.every_lane(f"TF32({x})", "b32")
    if mode == "rz":
        return o.every_lane(f"UBFZ({x})", "b16")
    if to in FLOATS:
        return to_float(o, x, to, given, mode)
    if given in FLOATS:
        if mode and mode not in INTEGRAL:
            raise o.unsupported(NOT_EMULATED)
        return o.every_lane(f"to_int<{CTYPE[to]}>({INTEGRAL[mode or 'rzi']}({x}))", to)
    if o.has("sat"):
        limit = f"std::numeric_limits<{CTYPE[to]}>"
        x = f"std::min<__int128>(std::max<__int128>({x}, {limit}::min()), {limit}::max())"
    return o.every_lane(x, to)


def to_float(o: Decoded, x: str, to: str, given: str, mode: str) -> str:
    """Convert to a floating-point number, or to an integer in one."""
    if mode in INTEGRAL:
        value = f"{INTEGRAL[mode]}({x})"
    elif (to, given) == ("f16", "f64"):
        value = x  # rounded once, from all of its bits
    else:
        value = f"({VALUE[to]})({x})"
    return o.every_lane(flushed(o, f"sat({value})" if o.has("sat") else value, to), to)


def convert_pair(o: Decoded, to: str, mode: str) -> str:
    """Convert two float32 numbers into one register of f16x2 or bf16x2."""
    if mode not in ("rn", "rz") or (mode == "rz" and to == "f16x2"):
        raise o.unsupported(NOT_EMULATED)
    pack = "UBFZ" if mode == "rz" else PACK[to[:-2]]
    high, low = (f"max_num<f32>(0.f, {o.src(i, 'f32')})" if o.has("relu") else o.src(i, "f32") for i in (1, 2))
    return o.every_lane(f"((u32){pack}({high}) << 16) | (u32){pack}({low})", "b32")
