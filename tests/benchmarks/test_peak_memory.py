from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oner_fast.benchmarks import peak_memory
from oner_fast.benchmarks.cases import Call
from oner_fast.benchmarks.ops import cases
from oner_fast.benchmarks.peak_memory import saved_bytes

MIB = 2**20
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")


@linux
def test_the_peak_includes_memory_freed_within_the_call() -> None:
    """64 MiB that are freed and the 8 MiB of the result exist at once: 72 MiB, although only 8 MiB remain."""
    program = """
import json, torch
from oner_fast.benchmarks.peak_memory import peak_bytes
def run():
    result = torch.ones(2 * 2**20)
    for _ in range(3):
        scratch = torch.ones(16 * 2**20)
        del scratch
    return (result,)
peak, results = peak_bytes(run)
print(json.dumps([peak, results[0].nbytes]))
"""
    environment = {**os.environ, **peak_memory.ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, cwd="/"
    )
    peak, returned = json.loads(done.stdout)
    assert returned == 8 * MIB
    assert 71 * MIB <= peak <= 75 * MIB


@linux
def test_a_case_is_measured_in_a_process_of_its_own() -> None:
    """The output, (16, 98, 768) float32, has 4.6 MiB."""
    case = cases(quick=True, ops=["masked_gather"])[0]
    found = peak_memory.measure(case, "eager embedding", quick=True)
    out = 16 * 98 * 768 * 4
    assert out - MIB / 2 <= found.peak
    assert found.saved == 2 * 16 * 98 * 8 and found.saved_beyond_inputs == 0  # numbers of rows and of positions


def test_a_failing_process_says_why() -> None:
    case = cases(quick=True, ops=["masked_gather"])[0]
    with pytest.raises(peak_memory.Unavailable, match="has no contender 'nobody'"):
        peak_memory.measure(case, "nobody", quick=True)


def test_saved_bytes_count_each_storage_once() -> None:
    def forward(x: Tensor, y: Tensor) -> Tensor:
        product = x * y  # keeps x and y, which may share a storage
        return product.exp()  # keeps its result

    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(forward, Call((x, x), (x,))) == (8000, 4000)
    y = torch.ones(2, 1000, requires_grad=True)
    assert saved_bytes(forward, Call((x, y[0]), (x,))) == (4000 + 8000 + 4000, 4000)
