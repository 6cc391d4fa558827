"""Run unmodified Triton kernels on CPU tensors: compiled for a real GPU, their PTX is run on the CPU.

    from oner_fast.benchmarks.gpuless import emulate
    with emulate.active() as log:
        kernel[grid](x, y, n, BLOCK=128)                 # CPU tensors
    print(log[-1].stats.summary())

`emulate.install()` and `emulate.uninstall()` do the same without a block, with `emulate.log`.

Caught: everything that `ptx.Kernel` checks, on the code that the compiler really produced: layouts, pipelining,
barriers, waits for cp.async. Triton's own `OutOfResources` (shared memory) and its compile errors are those of the
target. `debug=True` in a launch adds Triton's `device_assert` and its checks for int32 overflow.

Not caught: anything that depends on time; what only newer targets do (wgmma, TMA). Autotuning takes one fixed
configuration. `TRITON_INTERPRET` must not be set.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from oner_fast.benchmarks.gpuless.architectures import ARCHITECTURES, REGISTERS
from oner_fast.benchmarks.gpuless.autotuning import FixedConfiguration
from oner_fast.benchmarks.gpuless.ptx import Checks, Kernel, KernelFault, Stats

CAPABILITIES = (80, 86, 89)
DEFAULT_CHECKS = Checks()
FIRST_DEVICE = 1_000_000  # the number of no device of a real driver, so that compiled kernels are not mixed up


@dataclass(frozen=True)
class Launch:
    """One entry of the log.

    Args:
        name: the kernel's name.
        grid: blocks in three dimensions.
        num_warps: warps of a block.
        shared: bytes of dynamic shared memory.
        stats: the counters.
        compiled: Triton's `CompiledKernel`; `compiled.asm["ptx"]` is what ran.
    """

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    shared: int
    stats: Stats
    compiled: Any


@dataclass
class _State:
    """Settings made by `install`; `loading` is the `CompiledKernel` that asks for its handles."""

    capability: int
    checks: Checks
    previous: Any
    autotuning: FixedConfiguration
    kernels: dict[str, Kernel] = field(default_factory=dict)  # by their PTX
    loading: Any = None


log: list[Launch] = []
_state: _State | None = None
_stock_init_handles = CompiledKernel._init_handles


def install(arch: int = 80, autotune: int = 0, checks: Checks = DEFAULT_CHECKS, **overrides: Any) -> None:
    """Run Triton's launches on the CPU from now on; a second call changes the settings.

    Args:
        arch: 80, 86 or 89.
        autotune: the index of the configuration that autotuning takes.
        checks: the checks that each launch makes.
        overrides: fields of `checks`, such as `race=False` or `max_errors=20`.

    Raises:
        RuntimeError: `TRITON_INTERPRET` is set.
        ValueError: the architecture cannot be run.
    """
    global _state
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it to emulate")
    if arch not in CAPABILITIES:
        raise ValueError(f"sm_{arch} cannot be run, only compiled (gpuless.aot); choose one of {CAPABILITIES}")
    uninstall()
    _state = _State(arch, replace(checks, **overrides), driver._active, FixedConfiguration(autotune))
    _state.autotuning.install()
    driver.set_active(_Driver())
    CompiledKernel._init_handles = _init_handles


def uninstall() -> None:
    """Restore Triton's own driver."""
    global _state
    if _state is not None:
        _state.autotuning.uninstall()
        driver.set_active(_state.previous)
        CompiledKernel._init_handles = _stock_init_handles
        _state = None


@contextmanager
def active(**settings: Any) -> Iterator[list[Launch]]:
    """Install within the block, with the arguments of `install`; yield the log, which starts empty.

    Blocks may be nested: afterwards the outer settings apply again.
    """
    outer = _state
    log.clear()
    install(**settings)
    try:
        yield log
    finally:
        uninstall()
        if outer is not None:
            install(outer.capability, outer.autotuning.index, outer.checks)


def _installed() -> _State:
    if _state is None:
        raise RuntimeError("a kernel that was compiled inside emulate.active() was launched outside of it")
    return _state


def _init_handles(self: Any) -> None:
    """Remember the kernel that is loading, so that `load_binary` finds its PTX; there is nothing to unload."""
    _installed().loading = self
    _stock_init_handles(self)
    self.module = None


class _Utils:
    """Stand in for the functions of a CUDA driver that Triton calls when it loads a kernel."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        chip = ARCHITECTURES[_installed().capability]
        return {
            "max_shared_mem": chip.shared_block, "max_num_regs": REGISTERS,
            "multiprocessor_count": chip.multiprocessors, "warpSize": 32,
        }  # fmt: skip

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Kernel, int, int, int]:
        state = _installed()
        ptx = state.loading.asm["ptx"]
        if ptx not in state.kernels:
            state.kernels[ptx] = Kernel(ptx, name)
        return state.loading, state.kernels[ptx], 0, 0, 1024  # module, function, registers, spills, most threads


class _NoTiming:
    """Stand in for `torch.cuda`, of which only `synchronize` is needed here."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name}: nothing can be timed or synchronised, kernels are emulated on the CPU")

    def synchronize(self, device: Any = None) -> None:
        """Do nothing: a launch has ended when it returns."""

    def current_device(self) -> int:
        number: int = driver.active.get_current_device()
        return number


class _Driver:
    """Stand in for Triton's driver of NVIDIA GPUs."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = _Utils(), _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", _installed().capability, 32)

    def get_current_device(self) -> int:
        return FIRST_DEVICE + _installed().capability

    def set_current_device(self, device: int) -> None:
        """Do nothing: there is one device."""

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(_installed().capability, 10)

    def get_device_interface(self) -> _NoTiming:
        return _NoTiming()


class _Launcher:
    """Run a launch of one compiled kernel, and log it."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.signature, self.metadata = tuple(src.signature.values()), metadata
        self.compiled = _installed().loading

    def __call__(
        self, gx: int, gy: int, gz: int, stream: int, kernel: Kernel, packed: Any, launch_metadata: Any,
        enter_hook: Any, exit_hook: Any, *args: Any,
    ) -> None:  # fmt: skip
        if self.metadata.num_ctas != 1:
            raise NotImplementedError("clusters (num_ctas > 1) are not emulated")
        values = [pack(kind, value) for kind, value in flatten(self.signature, args)]
        # Pointers to scratch memory follow the arguments.
        scratch = self.metadata.global_scratch_size * gx * gy * gz
        hidden: list[Any] = [torch.empty(scratch, dtype=torch.uint8) if scratch else None] + [None] * 8
        values += hidden[: len(kernel.params) - len(values)]
        shared, warps = self.metadata.shared, self.metadata.num_warps
        if enter_hook:
            enter_hook(launch_metadata)
        try:
            stats = kernel.launch((gx, gy, gz), warps * 32, values, shared=shared, checks=_installed().checks)
        except KernelFault as fault:
            self._record((gx, gy, gz), fault.stats)
            raise
        self._record((gx, gy, gz), stats)
        if exit_hook:
            exit_hook(launch_metadata)

    def _record(self, grid: tuple[int, int, int], stats: Stats) -> None:
        known = self.metadata
        log.append(Launch(known.name, grid, known.num_warps, known.shared, stats, self.compiled))


def flatten(kinds: Sequence[Any], values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Return the type and value of every kernel parameter.

    Tuples and tensor descriptors are taken apart, and constexprs left out.
    """
    for kind, value in zip(kinds, values, strict=False):
        if isinstance(kind, tuple):
            yield from flatten(kind, value)
        elif kind.startswith("tensordesc"):
            from triton.backends.driver import decompose_descriptor, expand_signature  # Triton 3.8 and later have them

            yield from zip(expand_signature((kind,), None, "nvTmaDesc"), decompose_descriptor(value), strict=False)
        elif kind != "constexpr":
            yield kind, value


def pack(kind: str, value: Any) -> Any:
    """Return a float as the bytes of its parameter type, and everything else as it is."""
    if kind in ("fp32", "f32", "fp64", "fp16"):
        return struct.pack({"fp64": "d", "fp16": "e"}.get(kind, "f"), value)
    if kind == "bf16":
        return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).item()).to_bytes(
            2, "little", signed=True
        )
    return value
