"""Gather the figures of the study of UTA, by held-out split, and compare its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from oner_fast.ablation.confidence import Difference, paired
from oner_fast.ablation.plan import Equal, PlannedRun
from oner_fast.ablation.results import DIRECTIONS, Measures, RowResult, by_row, compared_rows, retrieval_measures
from oner_fast.ablation.rows import AnyRow
from oner_fast.ablation.study import is_done, missing_figure
from oner_fast.evaluation.record import read_record

PROBES = ("knn", "linear_probe")
COMPARED = ("recall@10", "zero_shot@5")
"""Measures that rows are compared in."""


@dataclass(frozen=True)
class Comparison:
    """Two rows of one comparison, paired by seed: the difference of each measure, by split."""

    row: AnyRow
    against: AnyRow
    equal: Equal
    differences: dict[str, dict[str, Difference]]


def gather(planned: Sequence[PlannedRun]) -> list[RowResult]:
    """Read the figures of all runs that are done, by row and comparison; `measures` is by held-out split and seed.

    Raises ValueError where the evaluation of a done run lacks a figure.
    """
    return [_gather_row(runs) for runs in by_row(planned)]


def _gather_row(runs: list[PlannedRun]) -> RowResult:
    measures: dict[str, dict[int, Measures]] = {}
    chances = []
    for run in runs:
        if not is_done(run):
            continue
        for split, entry in splits_of(read_record(run.folder)).items():
            try:
                found = measures_of(entry)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise missing_figure(run, f"{type(error).__name__}: {error}") from error
            measures.setdefault(split, {})[run.seed] = found
            chances.append(found["chance@10"])
    return RowResult(runs[0].row, runs[0].equal, runs, measures, fmean(chances) if chances else None, {})


def splits_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the entries of whole splits, and none of a split's parts."""
    return {
        name: entry
        for name, entry in record.items()
        if isinstance(entry, dict) and entry.get("split") == name and all(way in entry for way in DIRECTIONS)
    }


def measures_of(entry: dict[str, Any]) -> Measures:
    """Flatten the figures of a split: retrieval, zero-shot, and the labels that k-NN and the probe predict."""
    found = retrieval_measures(entry)
    found["chance@10"] = fmean(float(entry[way]["chance@10"]) for way in DIRECTIONS)
    if "zero_shot" in entry:
        found |= {f"zero_shot@{k}": float(entry["zero_shot"][f"top{k}"]) for k in (1, 5)}
    for probe in PROBES:
        for label, figures in entry.get(probe, {}).items():
            found[f"{probe}_{label}"] = float(figures["top1"])
    return found


def compare(results: Sequence[RowResult]) -> list[Comparison]:
    """Compare each row with those that it names, within each comparison."""
    found = []
    for each, other in compared_rows(results):
        differences: dict[str, dict[str, Difference]] = {}
        for split in each.measures:
            for measure in COMPARED:
                difference = paired(each.by_seed(split, measure), other.by_seed(split, measure))
                if difference is not None:
                    differences.setdefault(split, {})[measure] = difference
        if differences:
            found.append(Comparison(each.row, other.row, each.equal, differences))
    return found
