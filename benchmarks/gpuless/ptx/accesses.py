"""Translate loads, stores, atomics and cp.async: every access is checked and counted by runtime.cpp."""

from __future__ import annotations

from oner_fast.benchmarks.gpuless.ptx.decoded import Decoded, handles
from oner_fast.benchmarks.gpuless.ptx.operands import (
    CTYPE,
    PACK,
    UNPACK,
    address,
    assign,
    base_symbol,
    bits_type,
    source,
)
from oner_fast.benchmarks.gpuless.ptx.parse import SIZES, split_operands
from oner_fast.benchmarks.gpuless.ptx.program import Instruction, Register

SPACES = ("global", "shared", "local", "param", "const")
SCOPES = "relaxed acquire release acq_rel volatile weak cta gpu sys "
CACHE = "ca cg cs lu cv wb wt nc unified L1::* L2::* shared::cta "
STRONG = ("relaxed", "acquire", "release", "acq_rel", "volatile")
ATOMIC_OPS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
SITES = {"WRITE": "st", "ATOMIC": "atom"}  # the name of a counted access by its kind; all others are `ld`


def space(o: Decoded) -> str:
    """Return the memory that an instruction names; empty for a generic address."""
    return next((s for s in (m.split("::")[0] for m in o.mods) if s in SPACES), "")


def elements(text: str) -> list[str]:
    """Return the registers of a vector operand."""
    return split_operands(text[1:-1]) if text.startswith("{") else [text]


def global_loop(
    o: Decoded, addr: str, kind: str, body: str, size: int, generic: bool, before: str = "", value: str = "nullptr"
) -> str:
    """Return a loop that checks the address a_[l] of each active lane, runs `body` there and counts what is global."""
    site = o.new_site(f"global_{SITES.get(kind, 'ld')}")
    if generic:
        check = f"if (check_generic({o.inst.index}, w, l, a_[l], {size}, {kind}, {value})) g_ |= 1u << l;"
    else:
        check = f"check_global({o.inst.index}, w, l, a_[l], {size}, {kind}); g_ |= 1u << l;"
    return (
        f"{{ u64 a_[32]; u32 g_ = 0; LM {{ a_[l] = {addr}; {before} {check} {body} }} "
        f"count_global({site}, a_, g_, {size}); }}"
    )


def shared_loop(
    o: Decoded, addr: str, kind: str, body: str, size: int, before: str = "", value: str = "nullptr"
) -> str:
    """Return such a loop for shared memory."""
    site = o.new_site(f"shared_{SITES.get(kind, 'ld')}")
    check = f"check_shared({o.inst.index}, w, l, a_[l], {size}, {kind}, {value});"
    return f"{{ u32 a_[32]; LM {{ a_[l] = {addr}; {before} {check} {body} }} count_shared({site}, a_, m, {size}); }}"


def local_loop(o: Decoded, addr: str, body: str, size: int) -> str:
    """Return such a loop for local memory, which is not counted."""
    return f"LM {{ u64 a_ = {addr}; check_local({o.inst.index}, w, l, a_, {size}); {body} }}"


@handles("ld ldu", " ".join(SPACES) + " v2 v4 v8 " + SCOPES + CACHE)
def load(o: Decoded) -> str:
    """Load a number or a vector."""
    where, targets, size, ty = space(o), elements(o.args[0]), o.size, bits_type(o.ty)
    total = size * len(targets)

    def read(base: str) -> str:
        return " ".join(
            f"{{ {CTYPE[ty]} v_; memcpy(&v_, (const u8*)({base}) + {size * i}, {size}); "
            f"{assign(o.inst, each, ty, 'v_')} }}"
            for i, each in enumerate(targets)
        )

    kind = "STRONG_READ" if o.has(*STRONG) else "READ"
    if where == "param" and (named := base_symbol(o.inst, o.args[1])):
        where = named.space  # of the kernel, or of an inlined call
    if where == "param":
        return f"LN {{ {read(f'g_param + {address(o.inst, o.args[1], True)}')} }}"
    if where == "shared":
        return shared_loop(o, address(o.inst, o.args[1], True), kind, read("w->c->smem + a_[l]"), total)
    if where == "local":
        return local_loop(o, address(o.inst, o.args[1]), read("a_"), total)
    kind = "STRONG_READ" if where == "const" else kind
    return global_loop(o, address(o.inst, o.args[1]), kind, read("a_[l]"), total, not where)


@handles("st", " ".join(SPACES) + " v2 v4 v8 " + SCOPES + CACHE)
def store(o: Decoded) -> str:
    """Store a number or a vector."""
    where, values, size, ty = space(o), elements(o.args[1]), o.size, bits_type(o.ty)
    total, kind = size * len(values), "ATOMIC" if o.has(*STRONG) else "WRITE"
    fill = f"u8 b_[{total}]; " + " ".join(
        f"{{ {CTYPE[ty]} v_ = {source(o.inst, each, ty)}; memcpy(b_ + {size * i}, &v_, {size}); }}"
        for i, each in enumerate(values)
    )
    if where == "shared":
        write = f"memcpy(w->c->smem + a_[l], b_, {total});"
        return shared_loop(o, address(o.inst, o.args[0], True), kind, write, total, fill, "b_")
    if where in ("local", "param"):
        return local_loop(o, address(o.inst, o.args[0]), f"{fill} memcpy((u8*)a_, b_, {total});", total)
    write = f"memcpy((u8*)a_[l], b_, {total});"
    return global_loop(o, address(o.inst, o.args[0]), kind, write, total, not where, fill, "b_")


@handles("atom red", " ".join(ATOMIC_OPS) + " global shared noftz " + SCOPES + CACHE)
def atomic(o: Decoded) -> str:
    """Read, modify and write atomically; `atom` returns the old value."""
    where, op = space(o), o.one_of(ATOMIC_OPS)
    at = 1 if o.root == "atom" else 0
    ty, c = bits_type(o.ty), CTYPE[o.ty]
    value = o.src(at + 1, ty)
    place = "w->c->smem + a_[l]" if where == "shared" else "a_[l]"
    keep = o.dst("o_", ty) if o.root == "atom" else ""
    if op == "exch":
        new = f"({c}){value}"
    elif op == "cas":
        new = f"(o_ == ({c}){value} ? ({c}){o.src(at + 2, ty)} : o_)"
    else:
        new = updated(o, op, value, c)
    body = (
        f"{c} o_; memcpy(&o_, (u8*)({place}), {o.size}); {c} n_ = {new}; memcpy((u8*)({place}), &n_, {o.size}); {keep}"
    )
    if where == "shared":
        return shared_loop(o, address(o.inst, o.args[at], True), "ATOMIC", body, o.size)
    return global_loop(o, address(o.inst, o.args[at]), "ATOMIC", body, o.size, not where)


def updated(o: Decoded, op: str, value: str, c: str) -> str:
    """Return the new value that an atomic operation computes from o_, the old value."""
    if o.ty in ("f16x2", "bf16x2"):
        t = o.ty[:-2]
        return " | ".join(
            f"((u32){PACK[t]}({UNPACK[t]}((u16)(o_ >> {k})) + {UNPACK[t]}((u16)({value} >> {k}))) << {k})"
            for k in (0, 16)
        )
    if o.ty in PACK:
        old, operand = f"{UNPACK[o.ty]}(o_)", f"{UNPACK[o.ty]}({value})"
        return f"{PACK[o.ty]}({old} + {operand})" if op == "add" else f"{PACK[o.ty]}({op}_num({old}, {operand}))"
    return {
        "add": f"({c})(o_ + {value})",
        "min": f"std::min<{c}>(o_, {value})",
        "max": f"std::max<{c}>(o_, {value})",
        "and": f"o_ & {value}",
        "or": f"o_ | {value}",
        "xor": f"o_ ^ {value}",
        "inc": f"(o_ >= {value} ? 0 : o_ + 1)",
        "dec": f"(o_ == 0 || o_ > {value} ? {value} : o_ - 1)",
    }[op]


@handles("cp", "async shared global ca cg commit_group wait_group wait_all " + CACHE)
def copy_async(o: Decoded) -> str:
    """Copy from global to shared memory, or wait for copies."""
    if "async" not in o.mods:
        raise o.unsupported()
    if o.has("commit_group"):
        return "async_commit(w);"
    if o.has("wait_group"):
        return f"async_wait(w, {int(o.args[0], 0)});"
    if o.has("wait_all"):
        return "async_commit(w); async_wait(w, 0);"
    size, args = int(o.args[2], 0), o.args[:-1] if any("cache_hint" in m for m in o.mods) else o.args
    copied = ""
    if len(args) > 3:  # bytes to copy, or a predicate to copy nothing; the rest is zero
        register = o.inst.names.get(args[3])
        if isinstance(register, Register) and register.cls == "p":
            copied = f"({source(o.inst, args[3], 'pred')} ? 0 : {size})"
        else:
            copied = source(o.inst, args[3], "u32")
    fill = f"n_[l] = {copied};" if copied else ""
    return (
        f"{{ u32 d_[32], n_[32]; u64 s_[32]; LM {{ d_[l] = {address(o.inst, args[0], True)}; "
        f"s_[l] = {address(o.inst, args[1])}; {fill} }} "
        f"async_issue({o.inst.index}, {o.new_site('global_ld')}, w, m, d_, s_, {size}, "
        f"{'n_' if copied else 'nullptr'}); }}"
    )


@handles("cvta", "to shared global local const shared::cta")
def convert_address(o: Decoded) -> str:
    """Convert between a generic address and one of a memory."""
    offset = {"shared": "(u64)w->c->smem"}.get(space(o), "0")
    return o.every_lane(f"({o.src(1, 'u64')} {'-' if o.has('to') else '+'} {offset})", "u64")


@handles("isspacep", "shared global local shared::cta")
def is_space(o: Decoded) -> str:
    """Test which memory a generic address lies in."""
    a = o.src(1, "u64")
    shared = f"({a} - (u64)w->c->smem < w->c->smem_bytes)"
    local = f"({a} - (u64)w->local[l] < kernel_info.local_bytes)"
    tests = {"shared": shared, "local": local, "global": f"(!{shared} && !{local})"}
    return o.every_lane(tests[space(o)], "pred")


@handles("membar fence", "sc acq_rel acquire release cta gpu sys gl")
@handles("prefetch prefetchu", "global local L1 L2 L1::* L2::*")
@handles("nanosleep")
def nothing(o: Decoded) -> str:
    """Do nothing: blocks run one after the other, memory is coherent, there is no cache."""
    return ";"


@handles("createpolicy", "fractional range L1::* L2::* global")
def cache_policy(o: Decoded) -> str:
    """Make a cache policy, which has no effect here."""
    return o.every_lane("0", "b64")


def access_bytes(inst: Instruction) -> int | None:
    """Return the bytes of the smallest unit that an instruction moves, or None if it moves none.

    The smallest such unit of a kernel is the granularity at which its races are detected.
    """
    root, *mods = inst.op.split(".")
    if root in ("ld", "st", "atom", "red") and not {"param", "local", "const"} & set(mods):
        return min(SIZES[m] for m in mods if m in SIZES)
    return {"wmma": 2, "ldmatrix": 4, "cp": 4}.get(root)
