"""Read NVIDIA's machine code with the tools of Triton's wheel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence

from oner_fast.benchmarks.gpuless import tools

# Groups of instructions, by the beginning of their names.
GROUPS = {
    "HMMA": r"[HIDBQ]MMA",
    "HGMMA": r"[HIQ]GMMA",
    "UTCMMA": r"UTC\w*MMA",
    "LDGSTS": r"LDGSTS",
    "UTMA": r"UTMA",
    "LDG": r"LDG(?!STS|DEP)",
    "STG": r"STG",
    "ATOM": r"(RED|ATOM)G?\b",
    "LDSM": r"LDSM",
    "LDS": r"LDS(?!M)",
    "STS": r"STS",
    "SPILL": r"(LDL|STL)",
    "MUFU": r"MUFU",
    "FFMA": r"FFMA",
    "FADD/FMUL": r"F(ADD|MUL)",
    "SHFL": r"SHFL",
    "BAR": r"(BAR|SYNCS|WARPSYNC|DEPBAR)",
    "INT": r"(IMAD|IADD|LEA|LOP|SHF|ISETP|IMNMX|SEL|VIADD)",
}
# The name of an instruction and its operands, in a line of nvdisasm.
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
MATRIX = re.compile(r"HMMA|HGMMA|UTC|IMMA|DMMA")


def run_tool(name: str, *arguments: str) -> str:
    """Run a program of Triton's wheel and return what it prints.

    Raises:
        FileNotFoundError: this version of Triton does not contain the program.
    """
    program = tools.find(name)
    if program is None:
        raise FileNotFoundError(f"{name} is not in Triton's wheel")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return the output of `cuobjdump -res-usage` for a cubin, and its disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return run_tool("cuobjdump", "-res-usage", file.name), run_tool("nvdisasm", "-c", file.name)


def group(names: Iterable[str]) -> dict[str, int]:
    """Count instructions by group; `other` counts those of no group."""
    counts = Counter(next((g for g, p in GROUPS.items() if re.match(p, name)), "other") for name in names)
    return {each: counts[each] for each in [*GROUPS, "other"] if counts[each]}


def main_loop(disassembly: str) -> tuple[list[str], list[str]]:
    """Return the names of the instructions in the main loop, and the names of all instructions.

    The main loop is the backward branch that spans the most matrix instructions; among equals, the innermost. The loop
    is empty where nothing branches backward.
    """
    labels: dict[str, int] = {}
    names: list[str] = []
    branches: list[tuple[int, str]] = []
    for line in disassembly.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif found := INSTRUCTION.match(line):
            if found[1].startswith("BRA") and (to := re.search(r"`\((\.L\w+)\)", found[2])):
                branches.append((len(names), to[1]))
            names.append(found[1])
    loops = [names[labels[to] : at + 1] for at, to in branches if to in labels and labels[to] < at]

    def weight(loop: Sequence[str]) -> tuple[int, int]:
        return sum(bool(MATRIX.match(name)) for name in loop), -len(loop)

    return max(loops, key=weight, default=[]), names
