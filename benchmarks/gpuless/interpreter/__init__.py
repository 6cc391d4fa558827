"""Triton's interpreter (`TRITON_INTERPRET=1`) made strict, from `install` to `uninstall`.

    import os; os.environ["TRITON_INTERPRET"] = "1"      # before triton is imported
    from oner_fast.benchmarks.gpuless import interpreter
    interpreter.install()
    kernel[grid](x, y, n, BLOCK=128)                     # CPU tensors
    print(interpreter.stats.summary())

Repaired: bfloat16 (Triton's interpreter computes on its bit patterns and truncates casts), atomic add on bfloat16, and
autotuning, which takes one fixed configuration. As on a GPU, a float32 `tl.dot` rounds its operands to TF32 unless
`input_precision` says otherwise.

Caught, as `InterpreterError` with the kernel's line: accesses of active lanes outside the tensors passed; races between
programs (plain writes to what another program reads or writes, reads of what another writes); one store that writes an
address twice. Lanes that a load masks off without `other` are NaN. Counted: bytes, 32-byte sectors, the FLOPs of
`tl.dot`, exponentials.

Not caught: what the compiler and the hardware do (layouts, shared memory, barriers, limits on block shapes), which is
`emulate`'s part. Kernels that synchronise programs through locks or flags need `race=False`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton

from oner_fast.benchmarks.gpuless.autotuning import FixedConfiguration
from oner_fast.benchmarks.gpuless.interpreter.patches import PATCHES
from oner_fast.benchmarks.gpuless.interpreter.shadow import Memory, OutOfBounds, Race
from oner_fast.benchmarks.gpuless.interpreter.state import Settings, Stats, current, stats

__all__ = ["Memory", "OutOfBounds", "Race", "Settings", "Stats", "active", "install", "stats", "uninstall"]

_autotuning: FixedConfiguration | None = None


def install(autotune: int = 0, **options: Any) -> None:
    """Make the interpreter strict from now on; calling it again changes the settings.

    Args:
        autotune: the index of the configuration that autotuning takes.
        options: fields of `Settings`.

    Raises:
        RuntimeError: Triton was imported without `TRITON_INTERPRET=1`.
    """
    global _autotuning
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported and the kernels are defined")
    uninstall()
    current.settings = Settings(**options)
    for owner, names in PATCHES.items():
        for name, new in names.items():
            current.stock[name] = getattr(owner, name, None)
            setattr(owner, name, new)
    _autotuning = FixedConfiguration(autotune)
    _autotuning.install()


def uninstall() -> None:
    """Restore Triton's own interpreter."""
    global _autotuning
    if _autotuning is None:
        return
    for owner, names in PATCHES.items():
        for name in names:
            if current.stock[name]:
                setattr(owner, name, current.stock[name])
            else:
                delattr(owner, name)
    current.stock.clear()
    _autotuning.uninstall()
    _autotuning = None


@contextmanager
def active(**options: Any) -> Iterator[Stats]:
    """Install within the block, with the arguments of `install`; yield the counters, which start at zero.

    Blocks may be nested: afterwards the outer settings apply again.
    """
    outer = None if _autotuning is None else (_autotuning.index, vars(current.settings))
    stats.reset()
    install(**options)
    try:
        yield stats
    finally:
        uninstall()
        if outer is not None:
            install(outer[0], **outer[1])
