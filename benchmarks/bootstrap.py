"""Decide whether two series of rounds differ by more than their noise.

The statistic is the difference of the medians of log ratios. Its standard error comes from a block bootstrap: load from
neighbours lasts for seconds, so rounds that follow each other are alike, and only whole blocks of them are drawn. The
interval is the difference plus and minus that error times a quantile of Student's t with one degree of freedom less
than there are blocks. A comparison of many keys divides its error by their number (Bonferroni).

Where both series come from the same rounds, as `oner-fast bench against` measures them, the median of the differences
within a round takes the place of the difference of medians, and what slows a round cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

LEAST_ROUNDS = 5
MOST_BLOCKS = 16
RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True)
class Change:
    """Natural logarithm of "after / before", with its interval.

    Args:
        log: the estimate.
        low, high: the interval's ends.
    """

    log: float
    low: float
    high: float


def paired(before: Sequence[float], after: Sequence[float], *, block: int, error: float) -> Change:
    """Estimate the change between two series of positive numbers that share their rounds.

    Args:
        before, after: numbers of at least `LEAST_ROUNDS` rounds; the same place is the same round.
        block: number of rounds that were measured in one go; blocks hold a multiple of it.
        error: probability that the truth lies below the interval; as much for above. Where several comparisons are made
            and none should be wrong, it is divided by their number.

    Raises:
        ValueError: the series are too short, of different lengths, or hold a number that is not positive and finite.
    """
    if len(before) != len(after):
        raise ValueError(f"the same rounds are needed, got {len(before)} before and {len(after)} after")
    differences = _logs(after, "after") - _logs(before, "before")
    blocks = _blocks(differences, block)
    spread = float(_resampled_medians(blocks, SEED).std())
    return _change(float(differences.median()), spread, len(blocks) - 1, error)


def independent(before: Sequence[float], after: Sequence[float], *, block: int, error: float) -> Change:
    """Estimate the change between two series that were measured apart. Takes and raises as `paired`, of any lengths."""
    logs = [_logs(before, "before"), _logs(after, "after")]
    blocks = [_blocks(one, block) for one in logs]
    spread = float((_resampled_medians(blocks[1], SEED + 1) - _resampled_medians(blocks[0], SEED)).std())
    freedom = min(len(one) for one in blocks) - 1
    return _change(float(logs[1].median() - logs[0].median()), spread, freedom, error)


def _logs(values: Sequence[float], which: str) -> Tensor:
    if len(values) < LEAST_ROUNDS:
        raise ValueError(f"{len(values)} rounds {which}, and at least {LEAST_ROUNDS} are needed")
    if bad := next((value for value in values if not 0 < value < math.inf), None):
        raise ValueError(f"a round {which} has the value {bad}, and a positive, finite number is needed")
    return torch.tensor(values, dtype=torch.float64).log()


def _blocks(values: Tensor, block: int) -> Tensor:
    """Cut a series into at most `MOST_BLOCKS` blocks, (blocks, rounds in each); the rounds left over are dropped."""
    length = max(1, block) * math.ceil(len(values) / max(1, block) / MOST_BLOCKS)
    if len(values) // length < LEAST_ROUNDS:
        length = len(values) // LEAST_ROUNDS
    count = len(values) // length
    return values[: count * length].view(count, length)


def _resampled_medians(blocks: Tensor, seed: int) -> Tensor:
    """Draw as many blocks as there are, with replacement, `RESAMPLES` times; return the median of each drawing."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(blocks), (RESAMPLES, len(blocks)), generator=generator)
    return blocks[drawn].flatten(1).median(dim=1).values


def _change(log: float, spread: float, freedom: int, error: float) -> Change:
    reach = spread * student_t(1 - error, freedom)
    return Change(log, log - reach, log + reach)


@cache
def student_t(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, to about four digits for probabilities from 0.5 to 0.99999."""
    # With t = sqrt(freedom) tan(angle) the density of the angle is a power of its cosine.
    angles = torch.linspace(0, math.pi / 2, 400_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angles.cos().clamp_min(0) ** (freedom - 1), angles)
    place = int(torch.searchsorted(mass, (2 * probability - 1) * mass[-1]))
    return math.sqrt(freedom) * math.tan(float(angles[place + 1]))
