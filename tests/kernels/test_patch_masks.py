"""The Triton kernels that draw masks and boundaries, cell for cell against the definition."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.patch_masks import smallest
from oner_fast.ops.patch_masks import Pattern, boundaries, draw_masks, patch_mask

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PATTERNS: list[Pattern] = ["random", "block", "reversed_block"]


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Integers of every torch.empty are not what a mask or an index would be."""
    torch.use_deterministic_algorithms(True)


def both(seed: int, step: int | Tensor, samples: Tensor, grid: tuple[int, int], masked: int, *rest: Any) -> Tensor:
    """The masks by Triton, once the definition has drawn the same and the kept cells agree with them."""
    ours = draw_masks(seed, step, samples, grid, masked, *rest, implementation="triton")
    theirs = draw_masks(seed, step, samples, grid, masked, *rest, implementation="reference")
    assert ours.mask.dtype == torch.bool and ours.kept.dtype == torch.int64
    assert torch.equal(ours.mask, theirs.mask) and torch.equal(ours.kept, theirs.kept)
    assert (ours.mask.sum(1) == masked).all() and ours.kept.shape == (len(samples), grid[0] * grid[1] - masked)
    assert torch.equal(ours.mask.scatter(1, ours.kept, True), torch.ones_like(ours.mask))
    return ours.mask


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("seed", "step"), [(0, 1), (2**64 - 1, 2**32 - 1), (0xDEADBEEF80000000, 16)])
def test_masks_equal_the_reference_cell_for_cell(seed: int, step: int, pattern: Pattern, device: str) -> None:
    samples = torch.tensor([0, 1, 2, 17, 4095, 2**31, 2**32 - 1], device=device)
    both(seed, step, samples[:: 6 if INTERPRETED else 1], (16, 16), 128, pattern, 11)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [(7, 9), (1, 40), (3, 5), (1, 1)])
def test_every_grid_and_count(grid: tuple[int, int], pattern: Pattern, device: str) -> None:
    cells = grid[0] * grid[1]
    for masked in sorted({0, cells // 3, cells}):
        both(5, 3, torch.arange(2, device=device), grid, masked, pattern)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_cell_of_many_samples(pattern: Pattern, device: str) -> None:
    for seed, step in ((1, 0), (2**40 + 7, 123456)):
        both(seed, step, torch.arange(500, device=device), (16, 16), 128, pattern)
        both(seed, step, torch.arange(100, device=device), (24, 24), 300, pattern)
        both(seed, step, torch.arange(20, device=device), (7, 300), 1000, pattern)


@triton.jit(do_not_specialize=["count"])
def smallest_kernel(draws, free, out, count, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    found = smallest(tl.load(draws + place).to(tl.uint32), tl.load(free + place) != 0, count)
    tl.store(out + place, found.to(tl.int32))


def test_equal_draws_are_taken_in_the_order_of_cells(device: str) -> None:
    draws = torch.tensor([7, 2**32 - 1, 7, 0, 7, 2**32 - 1, 7, 2**31], device=device)
    free = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1], device=device)
    order = [3, 0, 2, 6, 7, 1, 5]
    for count in range(8):
        out = torch.empty(8, dtype=torch.int32, device=device)
        smallest_kernel[(1,)](draws, free, out, count, BLOCK=8, num_warps=1)
        assert out.nonzero().squeeze(1).tolist() == sorted(order[:count])


def test_random_masks_agree_with_patch_mask(device: str) -> None:
    samples = torch.arange(40, 44 if INTERPRETED else 60, device=device)
    before = patch_mask(7, 9, samples, 196, 98, 2, implementation="reference")
    assert torch.equal(patch_mask(7, 9, samples, 196, 98, 2, implementation="triton"), before)
    assert torch.equal(both(7, 9, samples, (14, 14), 98, "random", 2), before)


def test_a_step_tensor_on_the_device_is_read_at_each_launch(device: str) -> None:
    """A captured graph reads it again at every replay."""
    samples, step = torch.arange(2, device=device), torch.tensor(3, device=device)
    first = both(1, step, samples, (8, 8), 30, "block")
    step += 1
    second = both(1, step, samples, (8, 8), 30, "block")
    assert torch.equal(second, draw_masks(1, 4, samples, (8, 8), 30, "block").mask) and not torch.equal(first, second)


def test_samples_of_any_stride_and_no_samples(device: str) -> None:
    samples = torch.arange(8, device=device)
    assert torch.equal(both(1, 2, samples[::3], (8, 8), 32), both(1, 2, samples, (8, 8), 32)[::3])
    empty = draw_masks(1, 2, samples[:0], (8, 8), 32, implementation="triton")
    assert empty.mask.shape == (0, 64) and empty.kept.shape == (0, 32)


@pytest.mark.parametrize("samples", [0, 1, 5, 1023, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_boundaries(samples: int, dtype: torch.dtype, device: str) -> None:
    counts = torch.randint(0, 300, (samples,), dtype=dtype, device=device)
    found = boundaries(counts, implementation="triton")
    assert found.dtype == torch.int32 and found.tolist() == [0, *counts.cumsum(0).tolist()]
    assert torch.equal(boundaries(counts, implementation="reference"), found)


def test_boundaries_of_any_stride(device: str) -> None:
    counts = torch.arange(9, device=device)[::2]
    assert boundaries(counts, implementation="triton").tolist() == [0, 0, 2, 6, 12, 20]


def test_grids_too_large_for_a_program_are_refused_by_triton(device: str) -> None:
    with pytest.raises(RuntimeError, match="at most 16384 cells, not 20000"):
        draw_masks(0, 0, torch.arange(2, device=device), (100, 200), 5, implementation="triton")


def test_bytes_and_instructions(executor: Any, device: str) -> None:
    """All that is read is the samples, all that is written the mask and the kept cells, each once."""
    if executor is None:
        pytest.skip("the counters are those of the emulated GPU")
    draw_masks(3, 4, torch.arange(32), (16, 16), 128, "reversed_block", implementation="triton")
    stats = executor[-1].stats
    assert stats.unique_read_bytes == 32 * 8 and stats.unique_write_bytes == 32 * (256 + 128 * 8)
    assert stats.warp_instructions < 32 * 12000
