"""Decide whether two series of rounds differ by more than their noise.

The statistic is the difference of the medians of log ratios. Its standard error comes from a block bootstrap: load from
neighbours lasts for seconds, so rounds that follow each other are alike, and only whole blocks of them are drawn. A
block is at least twice as long as the rounds remember each other, by the correlation of neighbouring ranks; what they
remember across the edges of blocks is added. Noise of the series' own scale and memory is the least error, since a
bootstrap of few blocks is sometimes small by chance. The interval is the difference plus and minus the standard error
times a quantile of Student's t with one degree of freedom less than there are blocks. A comparison of many keys divides
its error by their number (Bonferroni).

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

LEAST_ROUNDS = 6
LEAST_BLOCKS, MOST_BLOCKS = 6, 16
# Of a longer memory nothing can be learned from some ten rounds.
MOST_CORRELATION = 0.9
RESAMPLES = 500
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
    spread, blocks = _standard_error(differences, block, SEED)
    return _change(float(_median(differences)), spread, blocks - 1, error)


def independent(before: Sequence[float], after: Sequence[float], *, block: int, error: float) -> Change:
    """Estimate the change between two series that were measured apart. Takes and raises as `paired`, of any lengths."""
    logs = [_logs(before, "before"), _logs(after, "after")]
    (old, old_blocks), (new, new_blocks) = (_standard_error(one, block, SEED + i) for i, one in enumerate(logs))
    change = float(_median(logs[1]) - _median(logs[0]))
    return _change(change, math.hypot(old, new), min(old_blocks, new_blocks) - 1, error)


def _logs(values: Sequence[float], which: str) -> Tensor:
    if len(values) < LEAST_ROUNDS:
        raise ValueError(f"{len(values)} rounds {which}, and at least {LEAST_ROUNDS} are needed")
    for value in values:
        if not 0 < value < math.inf:
            raise ValueError(f"a round {which} has the value {value}, and a positive, finite number is needed")
    return torch.tensor(values, dtype=torch.float64).log()


def _median(values: Tensor) -> Tensor:
    """Median of the last dimension. torch.median takes the lower of two middle values, which favours "faster"."""
    ordered, count = values.sort().values, values.shape[-1]
    return (ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2


def _standard_error(values: Tensor, block: int, seed: int) -> tuple[float, int]:
    """Estimate the standard error of a series' median by a block bootstrap; also return the number of blocks."""
    correlation = _correlation(values)
    memory = (1 + correlation) / (1 - correlation)
    # Blocks consist of whole visits, unless there are too few of these.
    length = max(math.ceil(len(values) / MOST_BLOCKS), math.ceil(2 * memory) if correlation > 0.2 else 1)
    length = max(1, block) * math.ceil(length / max(1, block))
    length = min(length, len(values) // LEAST_BLOCKS)
    count = len(values) // length
    blocks = values[: count * length].view(count, length)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (RESAMPLES, count), generator=generator)
    spread = float(_median(blocks[drawn].flatten(1)).std())
    across = 2 * correlation / ((1 - correlation**2) * length)
    spread /= math.sqrt(max(1 - across, 0.25))
    # The median of few blocks sometimes hardly moves by chance, which alone would call noise a change. No error is
    # smaller than that of normal noise with the series' own scale and memory.
    scale = 1.4826 * float(_median((values - _median(values)).abs()))
    return max(spread, scale * math.sqrt(math.pi / 2 * memory / len(values))), count


def _correlation(values: Tensor) -> float:
    """Estimate the correlation of neighbouring rounds by their ranks, which no outlier moves, from 0 to 0.9."""
    ranks = values.argsort().argsort().double()
    ranks -= ranks.mean()
    found = float((ranks[1:] * ranks[:-1]).sum() / ranks.square().sum())
    found += (1 + 3 * found) / len(values)  # short series look less alike than they are
    return min(max(found, 0.0), MOST_CORRELATION)


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
