"""A shadow of the tensors of a launch: who wrote and read each unit of memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton
from triton.runtime import interpreter as stock

from oner_fast.benchmarks.gpuless.interpreter.state import current, stats
from oner_fast.benchmarks.gpuless.ranges import regions

HERE = str(Path(__file__).parent)
OF_TRITON = tuple(
    module.__file__
    for module in (stock, triton.language.core, triton.language.semantic, triton.language.standard)
)  # fmt: skip
SECTOR_SHIFT = 5  # sectors of 32 bytes
SEVERAL = -1  # replaces a program's number where several have read


class OutOfBounds(Exception):
    """An active lane accesses memory outside the tensors of the launch."""


class Race(Exception):
    """Two programs, or two lanes of one store, access the same address, and one of them writes."""


def kernel_line() -> str:
    """Return `file:line` of the innermost frame that belongs to a kernel."""
    frame = sys._getframe(1)
    while frame and (frame.f_code.co_filename.startswith(HERE) or frame.f_code.co_filename in OF_TRITON):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "?"


class Region:
    """The shadow of one address range.

    Args:
        low, high: the first address and the one past the last.
        unit: bytes that share an entry.
    """

    def __init__(self, low: int, high: int, unit: int) -> None:
        self.low, self.unit, count = low, unit, (high - low) // unit + 1
        # The number of a program, plus 1; 0 is none.
        self.writer, self.reader = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.atomic = np.zeros(count, bool)
        self.sectors = {kind: np.zeros(((high - low) >> SECTOR_SHIFT) + 2, bool) for kind in ("read", "write")}

    def race(self, addresses: np.ndarray, size: int, kind: str, me: int) -> str:
        """Record the accesses of program `me` and describe the race that they cause; empty where they cause none."""
        for part in range(max(1, size // self.unit)):
            at = (addresses - self.low) // self.unit + part
            foreign = (self.writer[at] != 0) & (self.writer[at] != me)
            if kind == "atomic":
                foreign &= ~self.atomic[at]
            if foreign.any():
                return f"program {self.writer[at][foreign][0] - 1} wrote there too"
            if kind == "load":
                self.reader[at] = np.where((self.reader[at] == 0) | (self.reader[at] == me), me, SEVERAL)
                continue
            if ((self.reader[at] != 0) & (self.reader[at] != me)).any():
                return "another program reads it"
            if kind == "store" and np.unique(at).size != at.size:
                return "several lanes of this store have the same address"
            self.writer[at], self.atomic[at] = me, kind == "atomic"
        return ""

    def touch(self, addresses: np.ndarray, kind: str) -> None:
        """Record which sectors were read or written."""
        sectors = (addresses >> SECTOR_SHIFT) - (self.low >> SECTOR_SHIFT)
        self.sectors["read" if kind == "load" else "write"][sectors] = True


class Memory:
    """The tensors of one launch."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        unit = min([t.element_size() for t in tensors], default=1)
        ranges = regions(tensors)
        self.regions = [Region(low, high, unit) for low, high in ranges]
        self.lows = np.array([low for low, _ in ranges] or [0], np.int64)
        self.highs = np.array([high for _, high in ranges] or [0], np.int64)

    def access(self, builder: Any, pointers: np.ndarray, mask: Any, size: int, kind: str) -> None:
        """Check and count one access of `size` bytes a lane by the program that the builder runs.

        Args:
            builder: Triton's interpreter.
            pointers: an address for each lane.
            mask: the active lanes.
            size: bytes of a lane.
            kind: `load`, `store` or `atomic`.

        Raises:
            OutOfBounds, Race: the access is not allowed.
        """
        every, active = np.broadcast_arrays(pointers, np.asarray(mask))
        addresses = every[active].astype(np.int64)
        region = np.searchsorted(self.lows, addresses, side="right") - 1
        outside = (region < 0) | (addresses + size > self.highs[region])
        if current.settings.bounds and outside.any():
            raise OutOfBounds(self._outside(builder, addresses, region, outside, kind))
        stats.count(kind, addresses.size * size, np.unique(addresses >> SECTOR_SHIFT).size)
        me = 1 + int(np.ravel_multi_index(builder.grid_idx, builder.grid_dim))
        for number in np.unique(region[~outside]):
            shadow, mine = self.regions[number], addresses[(region == number) & ~outside]
            shadow.touch(mine, kind)
            if current.settings.race and (problem := shadow.race(mine, size, kind, me)):
                raise Race(f"{kind} at {kernel_line()}, program {me - 1}: {problem}")

    def _outside(self, builder: Any, addresses: np.ndarray, region: np.ndarray, outside: np.ndarray, kind: str) -> str:
        first = region[outside][0]
        low, high = int(self.lows[first]), int(self.highs[first])
        return (
            f"{kind} at {kernel_line()}, program {builder.grid_idx}: {int(outside.sum())} of {addresses.size} active "
            f"lanes out of bounds, e.g. byte {int(addresses[outside][0]) - low} of a tensor of {high - low} bytes"
        )

    def touched(self, what: str) -> int:
        """Return the bytes of all sectors that were touched: `read` or `write`."""
        return 32 * sum(int(region.sectors[what].sum()) for region in self.regions)
