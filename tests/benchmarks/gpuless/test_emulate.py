"""Compiled Triton kernels on the CPU: what only the compiler's code shows."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

from oner_fast.benchmarks.gpuless import emulate
from oner_fast.benchmarks.gpuless.ptx import Kernel, KernelFault, Stats

pytestmark = pytest.mark.usefixtures("compiled")


def run_mutant(ptx: str, entry: emulate.Launch, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Stats:
    """The matmul of 64 x 128 and 128 x 64 by another PTX, without raising."""
    kernel = Kernel(ptx)
    given = [a, b, c, 64, 64, 128, 128, 64, 64]
    hidden = [None] * (len(kernel.params) - len(given))
    return kernel.launch(entry.grid, 128, given + hidden, shared=entry.shared, raise_on_fault=False)


@pytest.fixture
def pipelined(log: Any, kernels: Any) -> tuple[emulate.Launch, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A launch of a pipelined kernel, its inputs and its result."""
    a, b = torch.randn(64, 128).half(), torch.randn(128, 64).half()
    c = kernels.run_matmul(a, b, BM=64, BN=64, num_stages=3)
    return log[-1], a, b, c


def test_a_deleted_barrier_is_a_race_or_was_not_needed(pipelined: Any) -> None:
    entry, a, b, right = pipelined
    ptx, flagged = entry.compiled.asm["ptx"], 0
    barriers = [found.start() for found in re.finditer(r"\tbar\.sync", ptx)]
    for at in barriers:
        c = torch.full_like(right, float("nan"))
        stats = run_mutant(ptx[:at] + "\t//" + ptx[at:], entry, a, b, c)
        flagged += any(each.kind == "SHARED RACE" for each in stats.findings)
        assert stats.findings or torch.equal(c, right)
    assert 2 * flagged > len(barriers) > 0


def test_data_read_before_its_wait_is_nan(pipelined: Any) -> None:
    entry, a, b, _ = pipelined
    weak = re.sub(r"cp\.async\.wait_group\s+\d", "cp.async.wait_group 7", entry.compiled.asm["ptx"])
    c = torch.zeros(64, 64).half()
    run_mutant(weak, entry, a, b, c)
    assert c.isnan().any()


def test_too_much_shared_memory_is_refused(log: Any, kernels: Any) -> None:
    a, b = torch.randn(128, 128), torch.randn(128, 256)
    with pytest.raises(OutOfResources, match="shared memory"):
        kernels.run_matmul(a, b, BM=128, BN=256, BK=64, num_stages=4, num_warps=8)


def test_integer_overflow_fails_an_assert_of_the_device(log: Any, kernels: Any) -> None:
    one, out = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(KernelFault, match="ASSERT.*overflow"):
        kernels.multiply[(1,)](one, out, 70000, 70000, debug=True)


def test_no_more_places_are_listed_than_asked_for(kernels: Any) -> None:
    with emulate.active(max_errors=1), pytest.raises(KernelFault) as raised:
        kernels.add_rows[(4,)](torch.ones(4, 64), torch.zeros(64), 64, BLOCK=64)
    assert len(raised.value.findings) == 1 < raised.value.total


def test_offsets_beyond_two_to_the_31(kernels: Any) -> None:
    x, y = torch.empty(2**31 + 8, dtype=torch.int8), torch.zeros(3, dtype=torch.int8)  # only the pages used exist
    x[:: 2**30] = torch.tensor([3, 5, 7], dtype=torch.int8)
    with emulate.active(global_race=False):
        kernels.far_rows[(3,)](x, y, 2**30)
    assert y.tolist() == [3, 5, 7]


def test_outer_settings_and_tritons_own_driver_are_restored(kernels: Any) -> None:
    before, x, y = driver._active, torch.ones(4, 64), torch.zeros(64)
    with emulate.active(global_race=False):
        assert driver._active is not before
        with emulate.active(), pytest.raises(KernelFault, match="GLOBAL RACE"):
            kernels.add_rows[(4,)](x, y, 64, BLOCK=64)
        kernels.add_rows[(4,)](x, y, 64, BLOCK=64)
    assert driver._active is before


def test_an_architecture_that_cannot_be_run_is_named() -> None:
    with pytest.raises(ValueError, match=r"sm_90 cannot be run, only compiled .* choose one of \(80, 86, 89\)"):
        emulate.install(arch=90)
