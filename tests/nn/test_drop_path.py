"""The factors of stochastic depth: their rates, and that nothing but the place of an image decides them."""

from __future__ import annotations

import pytest
import torch

from oner_fast.nn.drop_path import branch_factors


def test_rates_grow_linearly_and_kept_branches_make_up_for_skipped_ones() -> None:
    factors = branch_factors(0.4, 5, 7, 3, torch.arange(4000))
    assert factors.shape == (10, 4000) and factors.dtype == torch.float32
    for block in range(5):
        rate = 0.1 * block
        for row in factors[2 * block : 2 * block + 2]:
            assert row.unique().tolist() == pytest.approx(sorted({0.0, 1 / (1 - rate)} if block else {1.0}))
            # Five standard deviations of the share of 4,000 draws.
            assert (row == 0).float().mean().item() == pytest.approx(rate, abs=5 * (rate * (1 - rate) / 4000) ** 0.5)
    zeros = (factors[8:] == 0).float()  # both branches of the last block are decided apart
    assert (zeros[0] * zeros[1]).mean().item() == pytest.approx(0.16, abs=0.03)
    assert (branch_factors(0.5, 1, 7, 3, torch.arange(1000)) == 0).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_only_seed_step_and_place_decide() -> None:
    whole = branch_factors(0.5, 3, 7, 3, torch.arange(64))
    shuffled = torch.randperm(64)
    assert torch.equal(branch_factors(0.5, 3, 7, 3, shuffled), whole[:, shuffled])
    assert torch.equal(branch_factors(0.5, 3, 7, 3, torch.arange(40, 48)), whole[:, 40:48])
    for seed, step in ((8, 3), (7, 4)):
        assert not torch.equal(branch_factors(0.5, 3, seed, step, torch.arange(64)), whole)


def test_no_rate_keeps_everything() -> None:
    assert torch.equal(branch_factors(0.0, 3, 0, 0, torch.arange(8)), torch.ones(6, 8))
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got 1.0"):
        branch_factors(1.0, 3, 0, 0, torch.arange(8))
