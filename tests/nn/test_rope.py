"""Rotary positions against their definition: one rotation matrix for each pair, from a cell's row and column."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from oner_fast.nn.rope import RotaryPositions, rope_angles, rotate_first

GRID, HEADS, HEAD_DIM = 3, 2, 12


def turned(x: Tensor, cell: int | None, theta: float, rope_grid: int) -> Tensor:
    """Rotate one head of one token, pair by pair."""
    if cell is None:
        return x.clone()
    row, column = divmod(cell, GRID)
    result = x.clone()
    for pair in range(HEAD_DIM // 2):
        place, index = (row, pair) if pair < HEAD_DIM // 4 else (column, pair - HEAD_DIM // 4)
        angle = place * rope_grid / GRID / theta ** (index / (HEAD_DIM // 4))
        a, b = x[2 * pair], x[2 * pair + 1]
        result[2 * pair] = math.cos(angle) * a - math.sin(angle) * b
        result[2 * pair + 1] = math.sin(angle) * a + math.cos(angle) * b
    return result


@pytest.mark.parametrize(("theta", "rope_grid"), [(10000.0, 16), (50.0, 3)])
def test_each_pair_is_rotated(theta: float, rope_grid: int) -> None:
    places = torch.tensor([0, 5, 1, 9, 5])  # 0: [CLS]
    rope = RotaryPositions(GRID, HEAD_DIM, theta, rope_grid)
    x = torch.randn(5, 3, HEADS, HEAD_DIM, dtype=torch.float64)
    got, rest = rotate_first(x, rope(places, torch.float64), 2)
    for token, place in enumerate(places.tolist()):
        for part in range(2):
            for head in range(HEADS):
                expected = turned(x[token, part, head], place - 1 if place else None, theta, rope_grid)
                torch.testing.assert_close(got[token, part, head], expected, rtol=0, atol=1e-13)
    assert torch.equal(rest, x[:, 2:])


def test_kept_cells_are_rotated_as_in_the_full_grid() -> None:
    rope = RotaryPositions(GRID, HEAD_DIM)
    x = torch.randn(1 + GRID**2, 2, HEADS, HEAD_DIM)
    kept = torch.tensor([0, 7, 2, 9])
    full, _ = rotate_first(x, rope(torch.arange(1 + GRID**2), torch.float32), 2)
    some, _ = rotate_first(x[kept], rope(kept, torch.float32), 2)
    assert torch.equal(some, full[kept]) and not torch.equal(some[1:], x[kept][1:])


def test_scores_depend_on_the_offset_alone() -> None:
    rope = RotaryPositions(GRID, HEAD_DIM)
    query, key = torch.randn(2, HEAD_DIM, dtype=torch.float64)

    def score(query_cell: int, key_cell: int) -> float:
        pair = torch.stack([query, key]).view(2, 1, 1, HEAD_DIM)
        both, _ = rotate_first(pair, rope(torch.tensor([1 + query_cell, 1 + key_cell]), torch.float64), 1)
        return float((both[0] * both[1]).sum())

    assert score(0, 4) == pytest.approx(score(4, 8)) != pytest.approx(score(4, 0))
    assert score(1, 2) == pytest.approx(score(7, 8)) != pytest.approx(score(2, 5))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_gradient(parts: int) -> None:
    rotation = RotaryPositions(GRID, 4)(torch.tensor([0, 3, 8]), torch.float64)
    x = torch.randn(3, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate_first(x, rotation, parts), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_rounded_once(dtype: torch.dtype) -> None:
    rotation = RotaryPositions(GRID, HEAD_DIM)(torch.arange(10), dtype)
    x = torch.randn(10, 1, HEADS, HEAD_DIM).to(dtype)
    got, _ = rotate_first(x, rotation, 1)
    exact, _ = rotate_first(x.float(), rotation, 1)
    assert got.dtype == dtype and torch.equal(got, exact.to(dtype))


def test_the_table_keeps_its_precision_and_follows_its_module() -> None:
    rope = RotaryPositions(GRID, HEAD_DIM)
    before = rope.table.clone()
    assert torch.equal(rope.bfloat16().table, before) and not rope.state_dict()
    with torch.device("meta"):
        empty = RotaryPositions(GRID, HEAD_DIM)
    assert empty.table.is_meta
    assert torch.equal(empty.to_empty(device="cpu").table, before)


def test_head_dim_must_be_a_multiple_of_4() -> None:
    with pytest.raises(ValueError, match="a multiple of 4, got 6"):
        rope_angles(GRID, 6)
