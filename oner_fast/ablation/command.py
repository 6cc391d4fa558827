"""Parts that the commands of both studies share."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from oner_fast.ablation.plan import Equal, PlannedRun
from oner_fast.ablation.study import distinct, is_done
from oner_fast.ablation.tables import EQUAL, flops

PAGE_EVERY = 300.0
"""Seconds between two pages while runs go on."""
_SEED = re.compile(r".*-seed(\d{1,6})")


def say(line: str) -> None:
    """Print what is done now."""
    print(f"\n=== {line}", flush=True)


def show_warnings() -> None:
    """Show the library's log, and not that of open_clip, which tells of every file."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("oner_fast").setLevel(logging.INFO)


def every_seed(planned: Iterable[PlannedRun], out: Path) -> range:
    """Return the seeds from 0 to the last one of the plan or of the study's folder."""
    found = [int(match[1]) for path in out.glob("runs/*") if (match := _SEED.fullmatch(path.name))]
    return range(max([*(each.seed for each in planned), *found]) + 1)


def with_earlier(planned: Collection[PlannedRun], every: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Choose what the tables hold: the planned runs, and what is done of others.

    Args:
        planned: the runs that the command asks for.
        every: all runs that the folder may hold, in the tables' order.
    """
    asked = {(each.row.name, each.equal, each.seed) for each in planned}
    # A run that is the same in two comparisons does not make the second.
    at_steps = {each.folder for each in every if each.equal == "steps"}
    own = {each.equal for each in planned} | {"steps"}
    own |= {each.equal for each in every if each.folder not in at_steps and is_done(each)}
    return [
        each
        for each in every
        if (each.row.name, each.equal, each.seed) in asked or (each.equal in own and is_done(each))
    ]


def listing(planned: Sequence[PlannedRun], sample: str) -> list[str]:
    """Describe the plan in aligned lines, one for each row and comparison; operations are those of a `sample`."""
    groups: dict[tuple[str, Equal], list[PlannedRun]] = {}
    for each in planned:
        groups.setdefault((each.row.name, each.equal), []).append(each)
    wide = max((len(name) for name, _ in groups), default=3) + 2
    head = f"FLOPs {sample}"
    cost = len(head) + 2
    lines = [f"{'row':<{wide}}{'compared at':<18}{'steps':>7}{head:>{cost}}{'FLOPs a run':>13}{'done':>8}  changes"]
    for (name, equal), runs in groups.items():
        first = runs[0]
        done = f"{sum(is_done(each) for each in runs)}/{len(runs)}"
        lines.append(
            f"{name:<{wide}}{EQUAL[equal]:<18}{first.config.optim.steps:>7,}{flops(first.pair_flops):>{cost}}"
            f"{flops(first.flops):>13}{done:>8}  {first.row.title}"
        )
    every = distinct(planned)
    left = [each for each in every if not is_done(each)]
    rest = f"; the others take {flops(sum(each.flops for each in left))}FLOPs" if left else ""
    lines.append(f"{len(every)} runs, {len(every) - len(left)} of them done{rest}")
    return lines
