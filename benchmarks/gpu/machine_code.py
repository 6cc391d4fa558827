"""Read machine code of kernels: registers, spills, shared memory, occupancy, tensor cores, asynchronous copies.

Needs no GPU and no driver: Triton's wheel brings ptxas, cuobjdump and nvdisasm, and compiles for AMD's GPUs too.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from oner_fast.kernels.launch import Compilation

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WARP_REGISTERS, REGISTERS = 256, 65536  # unit of a warp's registers; registers of a multiprocessor
RESERVED = 1024  # bytes of shared memory that the system takes from each block
MATRIX = re.compile(r"([HIDBQ]MMA|[HIQ]GMMA|UTC\w*MMA)\b|v_mfma|v_wmma")
ASYNCHRONOUS = re.compile(r"(LDGSTS|UTMALDG|UBLKCP)\b|global_load_lds|buffer_load\w*_lds")
LOCAL = re.compile(r"(LDL|STL)\b")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
AMD_INSTRUCTION = re.compile(r"^\s+([vs]_[a-z0-9_]+|ds_\w+|global_\w+|buffer_\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Chip:
    """Limits of a multiprocessor: resident warps, blocks and bytes of shared memory, and the bytes of one block."""

    warps: int
    blocks: int
    shared: int
    shared_block: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
CHIPS = {
    "sm_80": Chip(64, 32, 164 * 1024, 163 * 1024),
    "sm_86": Chip(48, 16, 100 * 1024, 99 * 1024),
    "sm_89": Chip(48, 24, 100 * 1024, 99 * 1024),
    "sm_90": Chip(64, 32, 228 * 1024, 227 * 1024),
    "sm_100": Chip(64, 32, 228 * 1024, 227 * 1024),
}
AMD_SHARED_BLOCK = 64 * 1024


@dataclass(frozen=True)
class Figures:
    """Figures of one kernel compiled for one target; `error` alone where it did not compile.

    Args:
        registers: registers of a thread.
        local: number of instructions that read or write local memory, which are spills.
        shared: bytes of shared memory of a block; dynamic memory of CUDA C++ kernels is unknown before their launch.
        warps: warps of a block; 0 where only the launch decides.
        matrix, asynchronous: numbers of instructions that multiply on tensor cores, and that copy to shared memory
            asynchronously.
    """

    name: str
    target: str
    registers: int = 0
    local: int = 0
    shared: int = 0
    warps: int = 0
    matrix: int = 0
    asynchronous: int = 0
    error: str = ""

    @property
    def occupancy(self) -> float | None:
        """Share of a multiprocessor's warps that can be resident."""
        return occupancy(self.target, self.registers, self.shared, self.warps)

    def problems(self, tensor_cores: bool = False) -> list[str]:
        """List the defects that must not occur on a GPU that we tune for."""
        if self.error:
            return [f"does not compile: {self.error}"]
        limit = CHIPS[self.target].shared_block if self.target in CHIPS else AMD_SHARED_BLOCK
        found = [f"{self.local} instructions spill"] if self.local else []
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, {limit} is the most")
        if tensor_cores and not self.matrix:
            found.append("no tensor-core instruction")
        return found


def occupancy(target: str, registers: int, shared: int, warps: int) -> float | None:
    """Compute the occupancy by the rules of CUDA's calculator; None for an unknown target or block."""
    if target not in CHIPS or not warps:
        return None
    chip = CHIPS[target]
    of_warp = -(-registers * 32 // WARP_REGISTERS) * WARP_REGISTERS
    by_registers = REGISTERS // 4 // of_warp * 4 // warps if of_warp else chip.blocks
    by_shared = chip.shared // (-(-(shared + RESERVED) // 128) * 128)
    return min(by_registers, by_shared, chip.warps // warps, chip.blocks) * warps / chip.warps


def compile_triton(compilation: Compilation, target: str) -> Figures:
    """Compile one kernel, as a launch would, for a GPU that need not be present."""
    try:
        compiled = triton.compile(_source(compilation), target=_gpu(target), options=dict(compilation.options))
    except Exception as error:  # the report shows any error of a compiler
        return Figures(compilation.name, target, error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if "cubin" not in compiled.asm:
        return _of_amd(compilation.name, target, compiled.asm["amdgcn"], shared, warps)
    (figures,) = of_cubin(compiled.asm["cubin"], target).values()
    return Figures(
        compilation.name, target, figures.registers, figures.local, shared, warps, figures.matrix, figures.asynchronous
    )


def of_cubin(cubin: bytes, target: str) -> dict[str, Figures]:
    """Figures of every kernel in a cubin, by its name there; `shared` is static and `warps` unknown.

    Raises ValueError where the disassembly cannot be read.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = _run("cuobjdump", "-res-usage", file.name), _run("nvdisasm", "-c", file.name)
    listings = dict(re.findall(r"^\s*\.section\s+\.text\.(\S+?),.*?\n(.*?)(?=^\s*\.section\s|\Z)", code, re.S | re.M))
    found = {}
    for name, numbers in re.findall(r"Function (\S+?):\s*(REG:.*)", usage):
        names = INSTRUCTION.findall(listings[name])
        if not names:
            raise ValueError(f"nvdisasm lists no instruction of {name}")
        of = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        found[name] = Figures(
            name, target, of["REG"], _count(LOCAL, names), of["SHARED"], 0, _count(MATRIX, names),
            _count(ASYNCHRONOUS, names),
        )  # fmt: skip
    return found


def versions() -> str:
    """Versions of the compilers; another version may assign other registers."""
    release = re.search(r"V(\d[\d.]*)", _run("ptxas", "--version"))
    return f"Triton {triton.__version__}, ptxas {release[1] if release else 'unknown'}"


def _source(compilation: Compilation) -> ASTSource:
    kernel = compilation.kernel
    constants = {p.name: p.default for p in kernel.params if p.name not in compilation.signature and p.has_default}
    constants.update(compilation.constexprs)
    types = {name: "constexpr" if name in constants else compilation.signature[name] for name in kernel.arg_names}
    divisible: Mapping[str, int] = {
        **{name: 16 for name, kind in types.items() if kind.startswith("*")}, **compilation.divisible,
    }  # fmt: skip
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", by]] for name, by in divisible.items()}
    return ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)


def _gpu(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


def _of_amd(name: str, target: str, assembly: str, shared: int, warps: int) -> Figures:
    def number(key: str) -> int:
        return int((re.findall(rf"\.{key}:\s+(\d+)", assembly) or ["0"])[0])

    names = AMD_INSTRUCTION.findall(assembly)
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    matrix, copies = _count(MATRIX, names), _count(ASYNCHRONOUS, names)
    return Figures(name, target, number("vgpr_count"), spills, shared, warps, matrix, copies)


def _count(pattern: re.Pattern[str], names: list[str]) -> int:
    return sum(bool(pattern.match(name)) for name in names)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout
