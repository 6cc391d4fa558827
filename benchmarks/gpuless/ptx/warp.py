"""Translate instructions in which the lanes of a warp work together: shuffles, votes, barriers."""

from __future__ import annotations

from oner_fast.benchmarks.gpuless.ptx.decoded import Decoded, handles
from oner_fast.benchmarks.gpuless.ptx.operands import CTYPE, assign, predicate

SHUFFLES = ("up", "down", "bfly", "idx")
VOTES = {
    "ballot": ("b_", "b32"),
    "any": ("b_ != 0", "pred"),
    "all": ("b_ == m", "pred"),
    "uni": ("b_ == m || b_ == 0", "pred"),
}


@handles("shfl", "sync up down bfly idx")
def shuffle(o: Decoded) -> str:
    """Read a register of another lane."""
    targets = zip(o.args[0].split("|"), ("b32", "pred"), ("o_[l]", "p_[l]"), strict=False)
    out = " ".join(assign(o.inst, target, ty, value) for target, ty, value in targets)
    given = f"v_[l] = {o.src(1, 'b32')}; b_[l] = {o.src(2, 'u32')}; c_[l] = {o.src(3, 'u32')};"
    return (
        f"{{ u32 v_[32], b_[32], c_[32], o_[32], p_[32]; LM {{ {given} }} "
        f"shuffle({o.inst.index}, w, m, '{o.one_of(SHUFFLES)[0]}', v_, b_, c_, o_, p_); LM {{ {out} }} }}"
    )


@handles("vote", "sync ballot any all uni")
def vote(o: Decoded) -> str:
    """Collect a predicate of all lanes."""
    value, ty = VOTES[o.one_of(VOTES)]
    return f"{{ u32 b_ = 0; LM if ({predicate(o.inst, o.args[1])}) b_ |= 1u << l; LN {o.dst(value, ty)} }}"


@handles("activemask")
def active_mask(o: Decoded) -> str:
    """Give the mask of active lanes."""
    return o.every_lane("m", "b32")


@handles("redux", "sync add min max and or xor")
def reduce_warp(o: Decoded) -> str:
    """Reduce a register over all lanes."""
    c, given = CTYPE[o.ty], o.src(1)
    limit = f"std::numeric_limits<{c}>"
    steps = {
        "add": ("0", "x_ += v_"),
        "min": (f"{limit}::max()", "x_ = std::min(x_, v_)"),
        "max": (f"{limit}::min()", "x_ = std::max(x_, v_)"),
        "and": ("~0", "x_ &= v_"),
        "or": ("0", "x_ |= v_"),
        "xor": ("0", "x_ ^= v_"),
    }
    start, each = steps[o.one_of(steps)]
    return f"{{ {c} x_ = {start}; LM {{ {c} v_ = {given}; {each}; }} LN {o.dst('x_')} }}"


@handles("match", "any all sync")
def match(o: Decoded) -> str:
    """Find the lanes that hold the same value."""
    u = f"u{o.bits}"
    same = "u32 b_ = 0; for (int k = 0; k < 32; k++) if ((m >> k & 1) && v_[k] == v_[l]) b_ |= 1u << k;"
    read = f"{{ {u} v_[32]; LM v_[l] = {o.src(1, u)}; LM {{ {same} "
    if o.has("any"):
        return read + o.dst("b_", "b32") + " } }"
    targets = zip(o.args[0].split("|"), ("b32", "pred"), ("(b_ == m ? m : 0)", "b_ == m"), strict=False)
    return read + " ".join(assign(o.inst, target, ty, value) for target, ty, value in targets) + " } }"


@handles("bar", "warp sync")
def warp_barrier(o: Decoded) -> str:
    """Do nothing for bar.warp.sync: the lanes are in step already.

    Barriers of a block end a basic block, and are not translated here.
    """
    return ";"


@handles("barrier_result", "popc and or aligned")
def barrier_result(o: Decoded) -> str:
    """Read what a barrier with a reduction found."""
    field = {"popc": "red_count", "and": "red_and", "or": "red_or"}[o.one_of(("popc", "and", "or"))]
    return o.every_lane(f"w->c->{field}[{o.src(1, 'u32')}]", "pred" if o.ty == "pred" else "u32")


@handles("__assertfail")
def assert_fail(o: Decoded) -> str:
    """Fail with the message that is the first parameter, a C string in host memory."""
    slot = o.inst.names[o.args[0]].offset  # type: ignore[union-attr]
    return f"LM {{ u64 s_; memcpy(&s_, w->local[l] + {slot}, 8); assert_failed({o.inst.index}, w, l, s_); }}"
