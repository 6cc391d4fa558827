"""Read machine code of kernels: registers, spills, shared memory, occupancy, tensor cores, asynchronous copies.

Needs no GPU and no driver: Triton's wheel brings ptxas, cuobjdump and nvdisasm, and compiles for AMD's GPUs too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import triton

from oner_fast.benchmarks.gpuless import architectures, sass
from oner_fast.benchmarks.gpuless.compilation import compile_kernel
from oner_fast.kernels.launch import Compilation

TARGETS = (*architectures.GATED, "sm_100", "gfx942")
MATRIX = re.compile(r"([HIDBQ]MMA|[HIQ]GMMA|UTC\w*MMA)\b|v_mfma|v_wmma")
ASYNCHRONOUS = re.compile(r"(LDGSTS|UTMALDG|UBLKCP)\b|global_load_lds|buffer_load\w*_lds")
LOCAL = re.compile(r"(LDL|STL)\b")
AMD_INSTRUCTION = re.compile(r"^\s+([vs]_[a-z0-9_]+|ds_\w+|global_\w+|buffer_\w+)", re.MULTILINE)


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
        limit = architectures.shared_block_limit(self.target)
        found = [f"{self.local} instructions spill"] if self.local else []
        if limit is not None and self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, {limit} is the most")
        if tensor_cores and not self.matrix:
            found.append("no tensor-core instruction")
        return found


def occupancy(target: str, registers: int, shared: int, warps: int) -> float | None:
    """Compute the share of a multiprocessor's warps by CUDA's rules; None for an unknown target or block."""
    capability = architectures.capability_of(target)
    if capability not in architectures.ARCHITECTURES or not warps:
        return None
    return architectures.occupancy(capability, registers, shared, warps).share


def compile_triton(compilation: Compilation, target: str) -> Figures:
    """Compile one kernel, as a launch would, for a GPU that need not be present."""
    try:
        compiled = compile_kernel(
            compilation.kernel, compilation.signature, compilation.constexprs, compilation.divisible,
            compilation.options, target,
        )  # fmt: skip
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
    """Return the figures of every kernel in a cubin, by name. `shared` is the static part, and `warps` is unknown.

    Raises ValueError where the disassembly cannot be read.
    """
    usage, code = sass.disassemble(cubin)
    listings = dict(re.findall(r"^\s*\.section\s+\.text\.(\S+?),.*?\n(.*?)(?=^\s*\.section\s|\Z)", code, re.S | re.M))
    found = {}
    for name, numbers in re.findall(r"Function (\S+?):\s*(REG:.*)", usage):
        names = [found[1] for found in sass.INSTRUCTION.finditer(listings[name])]
        if not names:
            raise ValueError(f"nvdisasm lists no instruction of {name}")
        of = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        found[name] = Figures(
            name, target, of["REG"], _count(LOCAL, names), of["SHARED"], 0, _count(MATRIX, names),
            _count(ASYNCHRONOUS, names),
        )  # fmt: skip
    return found


def versions() -> str:
    """Versions of the compilers; another version may allocate registers differently."""
    release = re.search(r"V(\d[\d.]*)", sass.run_tool("ptxas", "--version"))
    return f"Triton {triton.__version__}, ptxas {release[1] if release else 'unknown'}"


def _of_amd(name: str, target: str, assembly: str, shared: int, warps: int) -> Figures:
    def number(key: str) -> int:
        return int((re.findall(rf"\.{key}:\s+(\d+)", assembly) or ["0"])[0])

    names = AMD_INSTRUCTION.findall(assembly)
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    matrix, copies = _count(MATRIX, names), _count(ASYNCHRONOUS, names)
    return Figures(name, target, number("vgpr_count"), spills, shared, warps, matrix, copies)


def _count(pattern: re.Pattern[str], names: list[str]) -> int:
    return sum(bool(pattern.match(name)) for name in names)
