"""Compile Triton kernels for GPUs that are not here, and report what the machine code says.

    report(kernel, signature, constexprs, divisible, options, targets) -> Report
    python -m oner_fast.benchmarks.gpuless.aot module:function [--targets sm_80,sm_90] [--strict]

`module.function()` returns a list of `Request`. With `--strict` the exit status is 1 when a target fails to compile,
spills, or needs more shared memory than a block may have.

Caught: compile errors of each target, register spills, too much shared memory (`triton.compile` does not check it), low
occupancy, a main loop without the tensor-core or asynchronous-copy instructions that were expected. Not caught: wrong
results, time. No GPU and no driver is needed: Triton's wheel brings ptxas, cuobjdump and nvdisasm.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oner_fast.benchmarks.gpuless.architectures import ARCHITECTURES, occupancy, shared_block_limit
from oner_fast.benchmarks.gpuless.compilation import compile_kernel
from oner_fast.benchmarks.gpuless.sass import disassemble, group, main_loop

HEAD = ("kernel", "target", "regs", "spill B", "smem KiB", "warps", "blocks/SM", "occupancy", "main loop", "problems")


@dataclass(frozen=True)
class Request:
    """One kernel to compile.

    Args:
        kernel: the `@triton.jit` function.
        signature: `{"x": "*fp16", "n": "i32", "s": "fp32"}`. A parameter that is left out takes its default and counts
            as constexpr.
        constexprs: the values of the constexpr parameters.
        divisible: `{"stride": 16}` says that an integer is divisible. Pointers are taken as divisible by 16 unless told
            otherwise.
        options: `num_warps`, `num_stages` and the like.
        name: the kernel's name in the report; by default its own name.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


@dataclass
class TargetReport:
    """Result of compiling one kernel for one target.

    Args:
        target: `sm_80`, `gfx942` and the like.
        error: the reason why it did not compile.
        registers: registers of a thread.
        spill_bytes: bytes that a thread spills.
        shared: bytes of a block; `shared_limit` is the most that it may have.
        warps: warps of a block.
        blocks_per_sm, occupancy, limited_by: as in `architectures.Occupancy`, where the target is known.
        mix: the number of instructions of the whole kernel, by group.
        loop: the names of the instructions of the main loop.
        seconds: the time that compiling took.
        compiled: Triton's `CompiledKernel`.
    """

    target: str
    error: str = ""
    registers: int = 0
    spill_bytes: int = 0
    shared: int = 0
    shared_limit: int = 0
    warps: int = 0
    blocks_per_sm: int = 0
    occupancy: float = 0.0
    limited_by: str = ""
    mix: dict[str, int] = field(default_factory=dict)
    loop: list[str] = field(default_factory=list)
    seconds: float = 0.0
    compiled: Any = None

    @property
    def loop_mix(self) -> dict[str, int]:
        """The number of instructions of the main loop, by group."""
        return group(self.loop)

    @property
    def problems(self) -> list[str]:
        """The problems for which `--strict` fails."""
        found = {
            "does not compile": bool(self.error),
            f"spills {self.spill_bytes} B": self.spill_bytes > 0,
            f"shared memory over {self.shared_limit} B": self.shared > self.shared_limit,
        }
        return [name for name, bad in found.items() if bad]


@dataclass
class Report:
    """One kernel on every target."""

    name: str
    targets: list[TargetReport]

    @property
    def ok(self) -> bool:
        """Whether no target has a problem."""
        return not any(each.problems for each in self.targets)

    def __getitem__(self, target: str) -> TargetReport:
        return next(each for each in self.targets if each.target == target)


def report(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    divisible: Mapping[str, int] | None = None,
    options: Mapping[str, Any] | None = None,
    targets: Sequence[str] = ("sm_80", "sm_90"),
    name: str = "",
) -> Report:
    """Compile one kernel for each target. The other arguments are those of `Request`."""
    request = Request(kernel, signature, constexprs or {}, divisible or {}, options or {}, name)
    return Report(name or getattr(kernel, "__name__", str(kernel)), [report_target(request, each) for each in targets])


def report_target(request: Request, target: str) -> TargetReport:
    """Compile one kernel for one target; an error of the compiler becomes part of the report."""
    found = TargetReport(target)
    start = time.perf_counter()
    try:
        compiled = found.compiled = compile_kernel(
            request.kernel, request.signature, request.constexprs, request.divisible, request.options, target
        )
    except Exception as error:  # whatever the compiler raises belongs in the report
        found.error = f"{type(error).__name__}: {error}"
        return found
    finally:
        found.seconds = time.perf_counter() - start
    found.shared, found.warps = compiled.metadata.shared, compiled.metadata.num_warps
    limit = shared_block_limit(target)
    found.shared_limit = found.shared if limit is None else limit
    if "cubin" in compiled.asm:
        _read_cubin(found, compiled.asm["cubin"], compiled.metadata.target.arch)
    else:
        _read_amd(found, compiled.asm["amdgcn"])
    return found


def _read_cubin(found: TargetReport, cubin: bytes, capability: int) -> None:
    usage, disassembly = disassemble(cubin)
    numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    found.registers = numbers["REG"]
    found.loop, names = main_loop(disassembly)
    found.mix = group(names)
    found.spill_bytes = numbers["STACK"] if "SPILL" in found.mix else 0
    if capability in ARCHITECTURES:
        resident = occupancy(capability, found.registers, found.shared, found.warps)
        found.blocks_per_sm, found.occupancy, found.limited_by = resident.blocks, resident.share, resident.limited_by


def _read_amd(found: TargetReport, assembly: str) -> None:
    def number(key: str) -> int:
        return int((re.findall(rf"\.{key}:\s+(\d+)", assembly) or ["0"])[0])

    found.registers, found.spill_bytes = number("vgpr_count"), 4 * number("vgpr_spill_count")
    names = re.findall(r"^\s+([vs]_[a-z0-9_]+|ds_\w+|global_\w+|buffer_\w+)", assembly, re.MULTILINE)
    found.mix = dict(Counter("matrix" if re.search("mfma|wmma", name) else name.split("_")[0] for name in names))


def table(reports: Sequence[Report]) -> str:
    """Return all reports as aligned text, one line a target, and the compilers' errors below."""
    rows = [HEAD, *(_row(one.name, each) for one in reports for each in one.targets)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    errors = [f"{one.name} {each.target}: {each.error}" for one in reports for each in one.targets if each.error]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *errors])


def _row(name: str, one: TargetReport) -> tuple[str, ...]:
    resident = f"{one.occupancy:.0%} ({one.limited_by})" if one.limited_by else "-"
    mix = " ".join(f"{k}:{v}" for k, v in (one.loop_mix or one.mix).items() if k not in ("other", "INT", "BAR"))
    numbers = (one.registers, one.spill_bytes, f"{one.shared / 1024:.1f}", one.warps, one.blocks_per_sm or "-")
    return (name, one.target, *map(str, numbers), resident, mix, "; ".join(one.problems))


def main(argv: Sequence[str] | None = None) -> int:
    """Compile all requests that a function lists and print the table; returns 1 for a problem under `--strict`."""
    parser = argparse.ArgumentParser(
        prog="python -m oner_fast.benchmarks.gpuless.aot",
        description="Compile Triton kernels for GPUs that are not here.",
    )
    parser.add_argument("requests", help="module:function that returns a list of aot.Request")
    parser.add_argument("--targets", default="sm_80,sm_90", help="for example sm_80,sm_86,sm_90,sm_100,gfx942")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 on compile errors, spills, too much shared memory"
    )
    options = parser.parse_args(argv)
    sys.path.insert(0, "")
    module, _, function = options.requests.partition(":")
    if not function:
        parser.error(f"needs module:function, got {options.requests!r}")
    reports = [
        report(each.kernel, each.signature, each.constexprs, each.divisible, each.options,
               options.targets.split(","), each.name)
        for each in getattr(importlib.import_module(module), function)()
    ]  # fmt: skip
    print(table(reports))
    return int(options.strict and not all(each.ok for each in reports))


if __name__ == "__main__":
    sys.exit(main())
