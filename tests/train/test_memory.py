"""Memory that a step has freed serves the next one without new pages."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from oner_fast.train.memory import keep_freed_memory
agreed = keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    return [torch.full((size << 18,), 1.0) for size in (48, 40, 64, 36, 52, 44)]
for _ in range(6):
    step()
before = faults()
step()
print(agreed, faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_large_tensors_come_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    agreed, faults = done.stdout.split()
    if agreed != "True":
        pytest.skip("the C library has no mallopt")
    # Six tensors of 36 to 64 MiB are 72,704 pages of 4 KiB.
    assert int(faults) < 2000
