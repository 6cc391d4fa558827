"""Gather the figures of a study from the folders of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from oner_fast.ablation.confidence import Difference, Spread, paired, spread
from oner_fast.ablation.plan import Equal, PlannedRun
from oner_fast.ablation.rows import AnyRow
from oner_fast.ablation.study import figures_of, missing_figure
from oner_fast.evaluation.folder import read_metrics
from oner_fast.evaluation.spaces import SPACES

SHOWN = ("backbone", "projection", "predictor", "teacher")
DIRECTIONS = ("image_to_text", "text_to_image")
KS = (1, 5, 10)

Measures = dict[str, float]
"""Figures of a run in one space: `image_to_text@1`, ..., `recall@10` (the mean of both directions), `zero_shot`, `gap`.
Shares, not per cent."""


@dataclass(frozen=True)
class Curve:
    """The modality gap over training: steps, and for each seed its values at these steps."""

    steps: list[int]
    seeds: dict[int, list[float]]

    @property
    def mean(self) -> list[float]:
        """The mean over the seeds at each step."""
        return [fmean(values) for values in zip(*self.seeds.values(), strict=True)]


@dataclass(frozen=True)
class RowResult:
    """The figures of one row in one comparison.

    Attributes:
        row: the row.
        equal: what the rows of the comparison have in common.
        planned: its runs, done or not.
        measures: by space and seed, of the runs that are done.
        chance: the share by chance of `recall@10`; None where no run is done.
        gaps: the gap over training, by space.
    """

    row: AnyRow
    equal: Equal
    planned: list[PlannedRun]
    measures: dict[str, dict[int, Measures]]
    chance: float | None
    gaps: dict[str, Curve]

    @property
    def steps(self) -> int:
        """The steps of each run."""
        return self.planned[0].config.optim.steps

    @property
    def pair_flops(self) -> float:
        """Operations of a pair, forward and backward."""
        return self.planned[0].pair_flops

    @property
    def done(self) -> int:
        """The number of runs that are done."""
        return len(next(iter(self.measures.values()), {}))

    def by_seed(self, space: str, measure: str) -> dict[int, float]:
        """Return a figure of each seed that has it."""
        return {seed: found[measure] for seed, found in self.measures.get(space, {}).items() if measure in found}

    def spread(self, space: str, measure: str) -> Spread | None:
        """Summarise a figure over the seeds."""
        return spread(list(self.by_seed(space, measure).values()))


@dataclass(frozen=True)
class Comparison:
    """Two rows of one comparison, paired by seed: the difference of `recall@10` in each space."""

    row: AnyRow
    against: AnyRow
    equal: Equal
    differences: dict[str, Difference]


def gather(planned: Sequence[PlannedRun]) -> list[RowResult]:
    """Read the figures of all runs that are done, by row and comparison, in the order of the plan.

    Raises ValueError where the evaluation of a done run lacks a figure.
    """
    return [_gather_row(runs) for runs in by_row(planned)]


def by_row(planned: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """Part runs by row and comparison, in the order of the plan."""
    groups: dict[tuple[str, Equal], list[PlannedRun]] = {}
    for run in planned:
        groups.setdefault((run.row.name, run.equal), []).append(run)
    return list(groups.values())


def _gather_row(runs: list[PlannedRun]) -> RowResult:
    measures: dict[str, dict[int, Measures]] = {}
    chances, curves = [], dict[str, dict[int, tuple[list[int], list[float]]]]()
    for run in runs:
        entry = figures_of(run)
        if entry is None:
            continue
        try:
            for space, figures in spaces_of(entry).items():
                measures.setdefault(space, {})[run.seed] = _measures(figures)
            chances += [float(entry[direction]["chance@10"]) for direction in DIRECTIONS]
        except (KeyError, TypeError, ValueError) as error:
            raise missing_figure(run, f"{type(error).__name__}: {error}") from error
        for space, curve in _gaps(run).items():
            curves.setdefault(space, {})[run.seed] = curve
    gaps = {}
    for space, seeds in curves.items():
        # A curve that a crash shortened would shift the mean.
        longest = max((steps for steps, _ in seeds.values()), key=len)
        gaps[space] = Curve(longest, {seed: values for seed, (steps, values) in seeds.items() if steps == longest})
    return RowResult(runs[0].row, runs[0].equal, runs, measures, fmean(chances) if chances else None, gaps)


def spaces_of(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the figures of each space; a model of two towers has one, its projection."""
    spaces = entry.get("spaces")
    if isinstance(spaces, dict):
        return {space: spaces[space] for space in SPACES if space in spaces}
    return {"projection": entry}


def retrieval_measures(figures: dict[str, Any]) -> Measures:
    """Flatten R@k of both directions, and add their mean."""
    found = {f"{way}@{k}": float(figures[way][f"R@{k}"]) for way in DIRECTIONS for k in KS}
    return found | {f"recall@{k}": fmean(found[f"{way}@{k}"] for way in DIRECTIONS) for k in KS}


def _measures(figures: dict[str, Any]) -> Measures:
    found = retrieval_measures(figures)
    if "zero_shot" in figures:
        found["zero_shot"] = float(figures["zero_shot"]["top1"])
    if "modality_gap" in figures:
        found["gap"] = float(figures["modality_gap"])
    return found


def _gaps(run: PlannedRun) -> dict[str, tuple[list[int], list[float]]]:
    """Read the gap over training in each space: steps and values."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in read_metrics(run.folder):
        for space in SHOWN:
            value = line.get(f"gap/{space}")
            if isinstance(value, int | float):
                steps, values = found.setdefault(space, ([], []))
                steps.append(int(line["step"]))
                values.append(float(value))
    return found


def compare(results: Sequence[RowResult]) -> list[Comparison]:
    """Compare each row with those that it names, within each comparison and in each space that both have."""
    found = []
    for each, other in compared_rows(results):
        differences = {}
        for space in SPACES:
            difference = paired(each.by_seed(space, "recall@10"), other.by_seed(space, "recall@10"))
            if difference is not None:
                differences[space] = difference
        if differences:
            found.append(Comparison(each.row, other.row, each.equal, differences))
    return found


def compared_rows(results: Sequence[RowResult]) -> Iterator[tuple[RowResult, RowResult]]:
    """Pair each row with those that it names, within each comparison."""
    places = {(each.row.name, each.equal): each for each in results}
    for each in results:
        for name in each.row.against:
            # Rows of the factors are at equal steps, as their base is.
            other = places.get((name, each.equal))
            if other is not None and not is_repeated(each, other, places):
                yield each, other


def is_repeated(one: RowResult, other: RowResult, places: Mapping[tuple[str, Equal], RowResult]) -> bool:
    """Tell whether the runs of two rows at equal operations are those at equal steps, which are compared already."""
    if one.equal == "steps":
        return False
    before = [places.get((each.row.name, "steps")) for each in (one, other)]
    return [each and each.steps for each in before] == [one.steps, other.steps]
