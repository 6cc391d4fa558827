"""Write a program as C++."""

from __future__ import annotations

import re
from collections.abc import Sequence

from oner_fast.benchmarks.gpuless.ptx import (  # noqa: F401  (they register the translators)
    arithmetic,
    bits,
    comparison,
    conversion,
    matrix,
    warp,
)
from oner_fast.benchmarks.gpuless.ptx.accesses import access_bytes
from oner_fast.benchmarks.gpuless.ptx.decoded import NewSite, translate
from oner_fast.benchmarks.gpuless.ptx.operands import lane, source
from oner_fast.benchmarks.gpuless.ptx.program import Instruction, Program


class Generator:
    """The C++ of a program.

    Args:
        program: the kernel.
        whole_warps: write each block a second time for warps in which all lanes are active. That takes twice as long to
            compile, and pays where the compiler optimises.

    Attributes:
        source: the C++ text, which includes runtime.h.
        sites: the instruction and the kind of every counted memory access.
        unit: bytes that share an entry of the shadow by which races are found.

    Raises:
        PtxError: an instruction is not emulated.
    """

    def __init__(self, program: Program, whole_warps: bool) -> None:
        self.program, self.whole_warps = program, whole_warps
        self.sites: list[tuple[Instruction, str]] = []
        self.guarded: list[str] = []  # functions for instructions under a predicate
        blocks = [self._block(number, insts) for number, insts in enumerate(program.blocks)]
        self.unit = min([size for inst in program.insts if (size := access_bytes(inst))], default=4)
        self.source = "\n".join([self._head(), *self.guarded, *blocks, self._tail()])

    def _new_site(self, inst: Instruction) -> NewSite:
        def site(kind: str) -> int:
            self.sites.append((inst, kind))
            return len(self.sites) - 1

        return site

    def _block(self, number: int, insts: Sequence[Instruction]) -> str:
        out = [f"template <bool FULL> static void b{number}(Warp* w, const u32 m) {{"]
        ended = False
        for inst in insts:
            guard = f"{'!' if inst.negated else ''}{lane(inst.guard)}" if inst.guard else ""
            code = self._branch(inst, guard, number + 1)
            ended = bool(code)
            if not ended:
                code = translate(inst, self._new_site(inst))
                if guard:
                    self.guarded.append(
                        f"static void g{inst.index}(Warp* w, const u32 m) {{ constexpr bool FULL = false; {code} }}"
                    )
                    code = f"{{ u32 g_ = 0; LN if ({guard}) g_ |= 1u << l; if (g_) g{inst.index}(w, g_); }}"
            out.append("  " + code)
        if not ended:
            out.append(f"  LN w->pc[l] = {number + 1};")
        return "\n".join([*out, "}"])

    def _branch(self, inst: Instruction, guard: str, following: int) -> str:
        """Return the C++ that chooses each lane's next block; empty for an instruction that does not end a block."""
        root, *mods = inst.op.split(".")
        test = guard or "1"
        if root == "bra":
            return f"LN w->pc[l] = {test} ? {self.program.labels[inst.args[0]]} : {following};"
        if root == "brx":
            table = ", ".join(str(self.program.labels[target]) for target in self.program.targets[inst.args[1]])
            chosen = f"t_[{source(inst, inst.args[0], 'u32')}]"
            return f"{{ static const u32 t_[] = {{{table}}}; LN w->pc[l] = {test} ? {chosen} : {following}; }}"
        if root in ("ret", "exit"):
            return f"LN {{ if ({test}) w->alive &= ~(1u << l); else w->pc[l] = {following}; }}"
        if root == "trap":
            fault = f'fault("TRAP", {inst.index}, w, l, "trap"); throw Abort();'
            return f"LN {{ if ({test}) {{ {fault} }} w->pc[l] = {following}; }}"
        if root in ("bar", "barrier") and "warp" not in mods:
            return self._barrier(inst, mods, test, following)
        return ""

    def _barrier(self, inst: Instruction, mods: Sequence[str], test: str, following: int) -> str:
        vote, args = "0", list(inst.args)
        if "red" in mods:  # destination, barrier, [threads,] predicate
            pred = args.pop()
            vote = ("!" if pred.startswith("!") else "!!") + source(inst, pred.lstrip("!"), "pred")
            args.pop(0)
        elif "sync" not in mods or "cluster" in mods:
            raise inst.unsupported()
        count = source(inst, args[1], "u32") if len(args) > 1 else "0u"
        return (
            f"LN {{ w->pc[l] = {following}; if ({test}) {{ w->waiting |= 1u << l; "
            f"w->bar_id[l] = {source(inst, args[0], 'u32')} & 15; "
            f"w->bar_count[l] = {count}; w->bar_pred[l] = {vote}; }} }}"
        )

    def _head(self) -> str:
        arrays = " ".join(
            f"alignas(64) {ty} {cls}[{max(1, self.program.registers[cls])}][32];"
            for cls, ty in (("p", "u32"), ("h", "u16"), ("r", "u32"), ("q", "u64"))
        )
        lines = [
            '#include "runtime.h"',
            f"struct Warp : WarpBase {{ {arrays} }};",
            "static const u32 g_zero[32] = {0};",
            "#define LN for (int l = 0; l < 32; l++) if (FULL || (m >> l & 1))",
            "#define LM for (int l = 0; l < 32; l++) if (m >> l & 1)",
        ]
        return "\n".join(lines)

    def _cases(self, full: str) -> str:
        return "\n".join(f"    case {i}: return b{i}<{full}>(w, m);" for i in range(len(self.program.blocks)))

    def _tail(self) -> str:
        p = self.program
        whole = f"  if (m == ~0u) switch (b) {{\n{self._cases('true')}\n  }}\n" if self.whole_warps else ""
        text = ",\n".join('"' + re.sub(r'[\\"]', "'", inst.where)[:200] + '"' for inst in p.insts)
        sizes = (
            f"{len(p.blocks)}, {len(p.insts)}, {len(self.sites)}, {p.static_smem}, {p.local_bytes}, sizeof(Warp), "
            f"{p.param_bytes}"
        )
        clear = " ".join(
            f"memset(w->{cls}, {value}, sizeof w->{cls});"
            for cls, value in (("p", "0"), ("h", "0xff"), ("r", "0xff"), ("q", "0xff"))
        )
        return f"""
void step(WarpBase* base, u32 b, u32 m) {{
  Warp* w = (Warp*)base;
{whole}  switch (b) {{
{self._cases("false")}
  }}
}}
void reset_registers(WarpBase* base) {{
  Warp* w = (Warp*)base;
  {clear}
}}
static const char* const text[] = {{
{text or '""'}
}};
const KernelInfo kernel_info = {{{sizes}, text}};
"""
