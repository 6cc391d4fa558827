"""The counters of a launch."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import astuple, dataclass

from oner_fast.benchmarks.gpuless.ptx.findings import Finding

SECTOR = 32  # bytes
MATRIX_SHAPE = re.compile(r"w?mma\.(?:mma\.)?sync.*?m(\d+)n(\d+)k(\d+)")


@dataclass
class Access:
    """Counters of memory instructions.

    Args:
        executed: number of warp instructions. `lanes`: number of active lanes in them.
        bytes: bytes that lanes requested.
        sectors: number of 32-byte sectors, in global memory.
        wavefronts: number of wavefronts, in shared memory. Those beyond `ideal_wavefronts` are bank conflicts.
    """

    executed: int = 0
    lanes: int = 0
    bytes: int = 0
    sectors: int = 0
    wavefronts: int = 0
    ideal_wavefronts: int = 0

    def __add__(self, other: Access) -> Access:
        return Access(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class Stats:
    """The counters of one launch.

    Args:
        kernel: its name.
        grid, block: in three dimensions.
        seconds: time that the emulation took.
        opcodes: number of warp instructions by name.
        memory: an `Access` for each of `global_ld`, `shared_st` and so on.
        places: source line and instruction, kind and `Access` of every memory instruction.
        unique_read_bytes, unique_write_bytes: bytes of the sectors touched, each sector once.
        findings: the places where a rule was broken.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    seconds: float
    opcodes: Counter[str]
    memory: dict[str, Access]
    places: list[tuple[str, str, Access]]
    unique_read_bytes: int
    unique_write_bytes: int
    findings: list[Finding]

    @property
    def warp_instructions(self) -> int:
        """Instructions that warps executed."""
        return sum(self.opcodes.values())

    @property
    def tensor_flops(self) -> int:
        """FLOPs of matrix instructions."""
        shapes = ((MATRIX_SHAPE.match(op), count) for op, count in self.opcodes.items())
        return sum(2 * int(m[1]) * int(m[2]) * int(m[3]) * count for m, count in shapes if m)

    def summary(self) -> dict[str, float | None]:
        """Return the totals, the share of the sectors' bytes that lanes requested, and factors of bank conflicts."""
        out: dict[str, float | None] = {
            "warp_instructions": self.warp_instructions,
            "tensor_flops": self.tensor_flops,
            "unique_read_bytes": self.unique_read_bytes,
            "unique_write_bytes": self.unique_write_bytes,
        }
        for kind, a in sorted(self.memory.items()):
            if kind.startswith("global"):
                out[f"{kind}_efficiency"] = round(a.bytes / (SECTOR * a.sectors), 3) if a.sectors else None
            else:
                factor = round(a.wavefronts / a.ideal_wavefronts, 3) if a.ideal_wavefronts else None
                out[f"{kind}_conflict_factor"] = factor
        return out
