"""Memory that a step has freed is used by the next step without new pages."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from oner_fast.train.engine.allocator import freed_memory_kept
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return [torch.full((size << 18,), 1.0) for size in (48, 40, 64, 36, 52, 44)]
def heap():
    return sum(int(b, 16) - int(a, 16) for a, b in (line.split()[0].split("-") for line in open("/proc/self/maps")
                                                    if line.rstrip().endswith("[heap]")))
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
small = resident()
with freed_memory_kept() as agreed:
    for _ in range(6):
        step()
    before = faults()
    step()
    found, large = faults() - before, resident()
after, bottom = resident(), heap()
room = torch.empty(1 << 30)
print(agreed, found, large - small, after - small, heap() - bottom)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_large_tensors_come_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    agreed, faults, kept, left, grown = done.stdout.split()
    if agreed != "True":
        pytest.skip("the C library has no mallopt")
    # Six tensors of 36 to 64 MiB are 72,704 pages of 4 KiB.
    assert int(faults) < 2000
    # Afterwards the pages are given back, and large tensors lie outside the heap, where glibc unmaps them.
    assert int(kept) > 200 << 20
    assert int(left) < 50 << 20 and int(grown) < 32 << 20
