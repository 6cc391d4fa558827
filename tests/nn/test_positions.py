"""Positions at other sizes: the same grid is the same table, and what is kept follows the table."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oner_fast.nn.positions import ResampledGrids, lengthen, resample_grid


def test_the_same_grid_is_the_same_table() -> None:
    table = torch.randn(9, 4)
    assert resample_grid(table, 3) is table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grid", [1, 2, 5, 24])
def test_a_larger_or_smaller_grid_keeps_the_dtype_and_a_constant(grid: int, dtype: torch.dtype) -> None:
    table = torch.tensor([0.5, -2.0, 1.0, 3.0], dtype=dtype).expand(9, 4)
    found = resample_grid(table, grid)
    assert found.shape == (grid**2, 4) and found.dtype == dtype
    torch.testing.assert_close(found, table[:1].expand(grid**2, 4))


def test_a_ramp_stays_a_ramp() -> None:
    rows = torch.arange(8, dtype=torch.float64).repeat_interleave(8).unsqueeze(1)
    found = resample_grid(rows, 16).view(16, 16)
    torch.testing.assert_close(found[4:12, 0], torch.arange(4, 12, dtype=torch.float64) / 2 - 0.25)
    torch.testing.assert_close(found, found[:, :1].expand(16, 16))


def test_a_grid_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"square grid, got \(8, 4\)"):
        resample_grid(torch.zeros(8, 4), 3)


def test_texts() -> None:
    table = torch.randn(4, 3)
    assert torch.equal(lengthen(table, 2), table[:2]) and torch.equal(lengthen(table, 4), table)
    assert torch.equal(lengthen(table, 6), torch.cat([table, table[3:], table[3:]]))


def test_what_is_kept_follows_the_table() -> None:
    table, grids = nn.Parameter(torch.randn(9, 4)), ResampledGrids()
    with torch.inference_mode():
        first = grids(table, 5)
        assert grids(table, 5) is first and not first.is_inference()
    assert grids(table, 5).requires_grad  # with a gradient to take, computed anew
    with torch.no_grad():
        table.mul_(2.0)
        second = grids(table, 5)
        torch.testing.assert_close(second, 2 * first)
        assert grids(table, 5) is second and grids(table, 4).shape == (16, 4)
        other = copy.deepcopy(grids)
        torch.testing.assert_close(other(nn.Parameter(table + 1), 5), second + 1)


def test_gradients_reach_the_table() -> None:
    table = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: resample_grid(given, 5), table)


@pytest.mark.parametrize("grid", [2, 3, 5, 9])
def test_the_gradient_is_that_of_the_interpolation(grid: int) -> None:
    """It is computed by products of matrices, as PyTorch's has no fixed order on CUDA."""
    positions = torch.randn(16, 3, dtype=torch.float64, requires_grad=True)
    image = positions.unflatten(0, (4, 4)).permute(2, 0, 1).unsqueeze(0)
    theirs = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)[0].permute(1, 2, 0).flatten(0, 1)
    ours, grad = resample_grid(positions, grid), torch.randn(grid**2, 3, dtype=torch.float64)
    assert torch.equal(ours, theirs)
    found, right = (torch.autograd.grad(x, positions, grad)[0] for x in (ours, theirs))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradgradcheck(lambda x: resample_grid(x, grid), positions)
    half = positions.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(resample_grid(half, grid), half, grad.bfloat16())
    assert found.dtype == torch.bfloat16 and (found - right).abs().max() < 0.02 * right.abs().max() + 0.02
