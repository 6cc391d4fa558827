"""Compare a step of ours with baselines of it: agreement first, then errors, then time in turns, then shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.limits import gemm_limits
from oner_fast.benchmarks.rows import Row
from oner_fast.benchmarks.step.agreement import Disagreement, check, errors
from oner_fast.benchmarks.step.shares import Share, shares
from oner_fast.benchmarks.step.steps import Step
from oner_fast.benchmarks.timing import Candidate, interleave

Tell = Callable[[str], None]


def contest(
    row: Row,
    ours: Step,
    plain: Sequence[Step],
    *,
    tolerances: tuple[float, float],
    flops: float,
    dtype: torch.dtype | None = None,
    exact: Step | None = None,
    rounds: int | None = None,
    seconds: float | None = None,
    tell: Tell = lambda text: None,
) -> dict[str, list[Share]]:
    """Fill in the row of a step; return each contender's shares. A baseline that disagrees is refused.

    Args:
        row: the row, with its names.
        ours, plain: our step and its baselines; the names of those without torch.compile end in "eager".
        tolerances: relative tolerances of the losses and of each gradient's L2 distance.
        flops: FLOPs that a step needs.
        dtype: dtype of its products; None is float32.
        exact: the step in float64, for the errors of the others; None measures none.
        rounds, seconds: how long to measure, as `interleave` takes it.
        tell: called with the current work.
    """
    steps: dict[str, Step] = {OURS: ours}
    for each in plain:
        tell(f"checking {each.name} against ours")
        try:
            check(ours, each, *tolerances)
            steps[each.name] = each
        except Disagreement as error:
            row.refused[each.name] = str(error)
    if exact is not None:
        tell("float64")
        row.precision = errors(exact, steps)
    limits = gemm_limits(dtype or torch.float32)
    candidates = [Candidate(name, step) for name, step in steps.items()]
    samples = interleave(
        [*candidates, *(limit.candidate for limit in limits)], rounds=rounds, seconds=seconds, progress=tell
    )
    row.add_times(samples, [name for name in steps if name.endswith("eager")], limits, {"gemm": flops})
    row.judge([])
    tell("profiling")
    found = {name: shares(step) for name, step in steps.items()}
    row.parts = {share.kind: share.share for share in found[OURS]}
    row.breakdown = {
        name: {share.kind: share.share * row.times[name].p50 for share in parts} for name, parts in found.items()
    }
    row.notes += _notes(found)
    return found


def _notes(found: Mapping[str, Sequence[Share]]) -> list[str]:
    return [
        f"ms of a profiled step of {name}: {', '.join(f'{one.kind} {1000 * one.seconds:.0f}' for one in parts)}"
        for name, parts in found.items()
    ]
