"""The exception that lists the findings of a launch."""

from __future__ import annotations

from collections.abc import Sequence

from oner_fast.benchmarks.gpuless.ptx.counters import Stats
from oner_fast.benchmarks.gpuless.ptx.findings import Finding


class KernelFault(Exception):
    """The launch broke a rule.

    Args:
        name: the kernel's name.
        total: number of violations, over all places.
        findings: the places where a rule was broken.
        stats: the counters of the launch.
    """

    def __init__(self, name: str, total: int, findings: Sequence[Finding], stats: Stats) -> None:
        more = f", first {len(findings)} places" if total > len(findings) else ""
        super().__init__(f"{name}: {total} finding(s){more}\n  " + "\n  ".join(map(str, findings)))
        self.total, self.findings, self.stats = total, findings, stats
