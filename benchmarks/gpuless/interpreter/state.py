"""The settings, counters and stock functions of the interpreter that is installed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Settings:
    """Checks that the interpreter makes, and the order in which programs run.

    Args:
        bounds: accesses lie in the tensors of the launch.
        race: no program writes what another one reads or writes.
        tf32: a float32 `tl.dot` rounds its operands to TF32, as on a GPU.
        poison: lanes that a load masks off without `other` are NaN.
        shuffle: the seed of a random order of the programs; None keeps their order.
    """

    bounds: bool = True
    race: bool = True
    tf32: bool = True
    poison: bool = True
    shuffle: int | None = None


@dataclass
class Stats:
    """Counters since the last reset, summed over programs.

    Args:
        load_bytes, store_bytes, atomic_bytes: bytes accessed by active lanes.
        load_sectors, store_sectors, atomic_sectors: 32-byte sectors of each access of each program.
        unique_read_bytes, unique_write_bytes: bytes that the last launch touched, in whole sectors.
        dot_flops: FLOPs of `tl.dot`.
        exponentials: count of numbers passed to exp, exp2, log and log2.
    """

    load_bytes: int = 0
    store_bytes: int = 0
    atomic_bytes: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    atomic_sectors: int = 0
    unique_read_bytes: int = 0
    unique_write_bytes: int = 0
    dot_flops: int = 0
    exponentials: int = 0

    def reset(self) -> None:
        """Set every counter to zero."""
        for name in vars(self):
            setattr(self, name, 0)

    def count(self, kind: str, size: int, sectors: int) -> None:
        """Add one access of a program: `load`, `store` or `atomic`, its bytes and its sectors."""
        setattr(self, f"{kind}_bytes", getattr(self, f"{kind}_bytes") + size)
        setattr(self, f"{kind}_sectors", getattr(self, f"{kind}_sectors") + sectors)

    def summary(self) -> dict[str, float]:
        """Return all counters, and the share of the loaded sectors' bytes that lanes requested."""
        return dict(vars(self), load_efficiency=round(self.load_bytes / max(1, 32 * self.load_sectors), 3))


@dataclass
class Current:
    """The state of the interpreter, of which a process has exactly one.

    Args:
        settings: the settings of the last `install`.
        stock: Triton's own functions by name, while replacements are installed.
        memory: the shadow of the launch that runs, a `shadow.Memory`; None before the first.
    """

    settings: Settings = field(default_factory=Settings)
    stock: dict[str, Any] = field(default_factory=dict)
    memory: Any = None


stats = Stats()
current = Current()
