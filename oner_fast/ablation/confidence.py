"""Means over seeds, and differences of rows paired by seed, with their confidence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95
_NO_WIDTH = 1e-9  # far below one query of any gallery, far above the rounding of a difference


@dataclass(frozen=True)
class Spread:
    """The mean over seeds, the standard deviation (None for one seed), and the number of seeds."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Difference:
    """The mean difference of two rows over the seeds that both have.

    Attributes:
        mean: the mean of the differences.
        half: half the width of the confidence interval; None for one seed.
        count: the number of seeds.
    """

    mean: float
    half: float | None
    count: int

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 0.

        Seeds whose differences are all equal, as shares of few queries may be, say nothing of the variation: such an
        interval of width 0 decides nothing.
        """
        return self.half is not None and _NO_WIDTH < self.half < abs(self.mean)


def spread(values: Sequence[float]) -> Spread | None:
    """Summarise the values of a row's seeds; None where there are none."""
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired(row: Mapping[int, float], against: Mapping[int, float]) -> Difference | None:
    """Compare two rows seed by seed; None where they share no seed.

    Runs of one seed see the same pairs in the same order in the same crops, so that their difference varies less than
    the rows do. The interval is Student's, of the mean of the differences over seeds.
    """
    seeds = sorted(row.keys() & against.keys())
    if not seeds:
        return None
    values = [row[seed] - against[seed] for seed in seeds]
    if len(values) == 1:
        return Difference(values[0], None, 1)
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Difference(fmean(values), half, len(values))


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Compute the two-sided quantile of Student's t distribution of a whole number of degrees of freedom.

    Raises:
        ValueError: `freedom` is below 1, or `confidence` is not between 0 and 1.
    """
    if freedom < 1 or not 0 < confidence < 1:
        raise ValueError(f"needs freedom >= 1 and confidence in (0, 1), got {freedom} and {confidence}")
    low, high = 0.0, 1.0
    while _central(high, freedom) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, freedom) < confidence else (low, middle)
    return high


def _central(t: float, freedom: int) -> float:
    """Probability that |T| <= t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom == 1:
        return 2 * angle / math.pi
    # Both series end with cos^(freedom - 2); each term follows from the one before.
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
