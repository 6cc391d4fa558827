"""Stochastic depth: each image skips residual branches at random, decided by a counter and by nothing else.

A decision is an integer comparison on a Philox draw keyed by (seed, step, place in the global batch, branch). One
process and many, micro-batches, packing, a replay and a restart therefore skip the same branches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oner_fast.philox import DROP_PATH, random_u32

BRANCHES = 2
"""Residual branches of a block: attention, then the feed-forward network."""


def branch_factors(rate: float, depth: int, seed: int, step: int, samples: Tensor) -> Tensor:
    """Draw the factor of each residual branch for each image: 0 where it is skipped, else 1 / (1 - its rate).

    The rate grows linearly with depth, from 0 in the first block to `rate` in the last. A trunk of one block has
    `rate`. The factors of kept branches make up for the skipped ones, so that the expected output is the same.

    Args:
        rate: share of images that skip a branch of the last block, in [0, 1).
        depth: blocks of the trunk.
        seed: seed of the training, in [0, 2^64).
        step: number of the step, in [0, 2^32).
        samples: (B,) int64, the places in the global batch.

    Returns:
        (2 * depth, B) float32, on the device of `samples`; rows 2 i and 2 i + 1 belong to block i.

    Raises:
        ValueError: the rate, the seed or the step is out of range.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
    draws = random_u32(seed, DROP_PATH, step, samples, BRANCHES * depth).t()
    rates = torch.linspace(0 if depth > 1 else rate, rate, depth, dtype=torch.float64).repeat_interleave(BRANCHES)
    limits = (rates * 2**32).round().long().to(samples.device).unsqueeze(1)
    kept = (1 / (1 - rates)).float().to(samples.device).unsqueeze(1)
    return torch.where(draws < limits, torch.zeros_like(kept), kept)
