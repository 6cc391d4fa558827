"""Launch PTX kernels on CPU tensors, with checks and counters."""

from __future__ import annotations

import ctypes
import random
import re
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from oner_fast.benchmarks.gpuless.ptx.codegen import Generator
from oner_fast.benchmarks.gpuless.ptx.counters import SECTOR, Access, Stats
from oner_fast.benchmarks.gpuless.ptx.faults import KernelFault
from oner_fast.benchmarks.gpuless.ptx.findings import Finding
from oner_fast.benchmarks.gpuless.ptx.parse import SIZES, Function, Module, Param, PtxError, parse
from oner_fast.benchmarks.gpuless.ptx.program import Program
from oner_fast.benchmarks.gpuless.ptx.toolchain import build, optimisation
from oner_fast.benchmarks.gpuless.ranges import regions

MOST_THREADS = 1024
Dimensions = tuple[int, int, int]


@dataclass(frozen=True)
class Checks:
    """Checks that a launch makes, and the order in which it runs the blocks.

    Args:
        bounds: every global access lies in one of the tensors passed.
        race: shared memory: two warps access the same bytes, one of them writes, and no barrier is between.
        global_race: global memory: two blocks access the same bytes, one of them writes, and not both are atomic. Off
            for kernels that order their blocks by flags.
        stats: sectors, bank conflicts and unique bytes are counted.
        seed: not 0: the warps of a block run in a random order.
        shuffle: the seed of a random order of the blocks; None keeps their order.
        max_errors: the most places reported, one for each instruction and kind.
        max_steps: basic blocks that a thread block may execute before it counts as hanging.
    """

    bounds: bool = True
    race: bool = True
    global_race: bool = True
    stats: bool = True
    seed: int = 0
    shuffle: int | None = None
    max_errors: int = 8
    max_steps: int = 20_000_000


DEFAULT_CHECKS = Checks()


@dataclass(frozen=True)
class _Ran:
    """Results of `ptx_run`: whether it stopped early, its report, and its counters."""

    aborted: bool
    report: str
    counts: Sequence[int]
    sites: Sequence[int]
    unique: Sequence[int]


class Kernel:
    """One kernel of a PTX text, compiled for the CPU.

    Args:
        ptx: the text.
        name: the kernel's name. C++ mangling may be omitted where that is unambiguous, and the whole name where the
            text has one kernel.

    Raises:
        PtxError: no kernel or several fit the name, something is not emulated, or there is no C++ compiler.
    """

    def __init__(self, ptx: str, name: str | None = None) -> None:
        module = parse(ptx)
        entry = choose_entry(module, name)
        self.name, self.params, self.program = entry.name, entry.params, Program(module, entry)
        generator = Generator(self.program, whole_warps=optimisation() != "-O0")
        self.sites, self.unit = generator.sites, generator.unit
        self.library = ctypes.CDLL(str(build(generator.source, self.name)))
        self._globals = [ctypes.create_string_buffer(v.init or bytes(v.size), max(1, v.size))
                         for v in self.program.globals]  # fmt: skip

    def launch(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared: int = 0,
        tensors: Iterable[Any] = (),
        checks: Checks = DEFAULT_CHECKS,
        raise_on_fault: bool = True,
        **overrides: Any,
    ) -> Stats:
        """Run the kernel and return its counters.

        Args:
            grid, block: one to three numbers.
            args: CPU tensors, Python numbers, None for a null pointer, or bytes.
            shared: bytes of dynamic shared memory.
            tensors: more tensors that the kernel may touch.
            checks: the checks to make.
            raise_on_fault: raise where a rule is broken; otherwise the findings are in the counters.
            overrides: fields of `checks`.

        Raises:
            KernelFault: the launch broke a rule.
            TypeError: an argument does not fit its parameter.
            ValueError: the block has no thread, or more than 1024.
        """
        checks = replace(checks, **overrides)
        blocks, threads = _three(grid), _three(block)
        if not 0 < threads[0] * threads[1] * threads[2] <= MOST_THREADS:
            raise ValueError(f"{self.name}: {threads} is not a block size")
        passed = [each for each in args if hasattr(each, "data_ptr")]
        buffers = [(ctypes.addressof(each), len(each)) for each in self._globals]
        start = time.perf_counter()
        ran = self._run(blocks, threads, self._pack(args), shared, regions([*passed, *tensors], buffers), checks)
        total, *lines = ran.report.split("\n")
        stats = self._stats(blocks, threads, time.perf_counter() - start, ran, [Finding.read(x) for x in lines if x])
        if (ran.aborted or int(total)) and raise_on_fault:
            raise KernelFault(self.name, int(total), stats.findings, stats)
        return stats

    def _pack(self, args: Sequence[Any]) -> bytes:
        if len(args) != len(self.params):
            raise TypeError(f"{self.name} has {len(self.params)} parameters, {len(args)} arguments given")
        out = bytearray(max(1, self.program.param_bytes))
        for value, param in zip(args, self.params, strict=True):
            if hasattr(value, "data_ptr"):
                if param.size != 8:
                    raise TypeError(f"{param.name} is .{param.type}, not a pointer")
                value = value.data_ptr()
            out[param.offset : param.offset + param.size] = pack(value, param)
        return bytes(out)

    def _run(
        self, grid: Dimensions, block: Dimensions, params: bytes, shared: int, ranges: Sequence[tuple[int, int]],
        c: Checks,
    ) -> _Ran:  # fmt: skip
        u32, u64 = ctypes.c_uint32, ctypes.c_uint64
        flat = [address for each in ranges for address in each] or [0, 0]
        config = struct.pack("4I3Q", c.race, c.bounds, c.global_race, c.stats, c.seed, c.max_errors, c.max_steps)
        order, total = None, grid[0] * grid[1] * grid[2]
        if c.shuffle is not None:
            order = (u64 * total)(*random.Random(c.shuffle).sample(range(total), total))
        report = ctypes.create_string_buffer(64 + 1024 * c.max_errors)
        counts, sites = (u64 * len(self.program.blocks))(), (u64 * (6 * (len(self.sites) + 1)))()
        unique = (u64 * 2)()
        pointers = (u64 * max(1, len(self._globals)))(*[ctypes.addressof(each) for each in self._globals])
        aborted = self.library.ptx_run(
            (u32 * 3)(*grid), (u32 * 3)(*block), u32(shared), params, (u64 * len(flat))(*flat), u32(len(ranges)),
            config, pointers, order, u32(self.unit), report, u64(len(report)), counts, sites, unique,
        )  # fmt: skip
        return _Ran(bool(aborted), report.value.decode(), list(counts), list(sites), list(unique))

    def _stats(self, grid: Dimensions, block: Dimensions, seconds: float, ran: _Ran, findings: list[Finding]) -> Stats:
        opcodes: Counter[str] = Counter()
        memory: defaultdict[str, Access] = defaultdict(Access)
        places = []
        for insts, count in zip(self.program.blocks, ran.counts, strict=True):
            for inst in insts:
                opcodes[inst.op] += count
        for number, (inst, kind) in enumerate(self.sites):
            access = Access(*ran.sites[6 * number : 6 * number + 6])
            places.append((inst.where, kind, access))
            memory[kind] += access
        read, written = (SECTOR * sectors for sectors in ran.unique)
        return Stats(self.name, grid, block, seconds, +opcodes, dict(memory), places, read, written, findings)


def choose_entry(module: Module, name: str | None) -> Function:
    """Return the kernel of a name: by its whole name, else by its C++ name, else by a part of it.

    Raises:
        PtxError: no kernel fits, or several do.
    """
    entries = [each for each in module.functions.values() if each.is_entry]
    wanted = name or ""
    mangled = re.compile(rf"_Z(?:\w*?\D)??{len(wanted)}{re.escape(wanted)}")
    found: list[Function] = []
    for fitting in (
        [each for each in entries if name is None or each.name == name],
        [each for each in entries if mangled.match(each.name)],
        [each for each in entries if wanted in each.name],
    ):
        found = fitting
        if found:
            break
    if len(found) == 1:
        return found[0]
    problem = "several kernels fit" if found else "no kernel fits"
    raise PtxError(f"{problem} {name!r}; the PTX has {[each.name for each in entries]}")


def pack(value: Any, param: Param) -> bytes:
    """Return a Python scalar as the bytes of a kernel parameter.

    Raises:
        TypeError: it does not fit the parameter.
    """
    if isinstance(value, (bytes, bytearray)):
        if len(value) != param.size:
            raise TypeError(f"{param.name}: {len(value)} bytes given, {param.size} wanted")
        return bytes(value)
    if param.count:
        raise TypeError(f"{param.name} is a structure: pass bytes")
    size = SIZES[param.type]
    if isinstance(value, float) and param.type not in ("f32", "f64", "b32", "b64"):
        raise TypeError(f"{param.name} is .{param.type}, not a float")
    if param.type[0] == "f" or isinstance(value, float):
        return struct.pack({2: "e", 4: "f", 8: "d"}[size], value)
    return (int(value or 0) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _three(sizes: int | Sequence[int]) -> Dimensions:
    given = [int(each) for each in sizes] if isinstance(sizes, Sequence) else [int(sizes)]
    x, y, z = [*given, 1, 1][:3]
    return x, y, z
