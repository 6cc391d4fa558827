"""Findings of the checks: a place where a kernel broke a rule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A place where a rule was broken.

    Args:
        kind: OUT OF BOUNDS, SHARED RACE and so on.
        block, warp, lane: the first to break it; lane -1 is the whole warp.
        count: number of violations at this instruction.
        message: what happened.
        where: source line and PTX instruction.
    """

    kind: str
    block: tuple[int, ...]
    warp: int
    lane: int
    count: int
    message: str
    where: str

    @classmethod
    def read(cls, line: str) -> Finding:
        """Read a line of the report of runtime.cpp."""
        kind, block, warp, lane, count, message, where = line.split("\t", 6)
        numbers = tuple(int(each) for each in block.split(","))
        return cls(kind, numbers, int(warp), int(lane), int(count), message, where)

    def __str__(self) -> str:
        place = f"\n    at {self.where}" if self.where else ""
        who = f"block {self.block} warp {self.warp} lane {self.lane}"
        return f"{self.kind} (x{self.count}) {who}: {self.message}{place}"
