"""`oner-fast ablate oner`: train and evaluate each row of the ablation, and write tables; `uta` is in `uta_cli`."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from oner_fast.ablation import uta_cli
from oner_fast.ablation.plan import Equal, PlannedRun, Settings, plan
from oner_fast.ablation.report import write
from oner_fast.ablation.rows import all_rows, chosen_rows
from oner_fast.ablation.study import Interrupted, begin, check_runs, check_settings, distinct, is_done, run_all
from oner_fast.ablation.tables import EQUAL, flops
from oner_fast.boundary import guarded
from oner_fast.train.oner import recipes

PROG = "oner-fast ablate oner"
_SEED = re.compile(r".*-seed(\d{1,6})")
_PAGE_EVERY = 300.0  # seconds between two pages while runs go on


@dataclass(frozen=True)
class Options:
    """Train every row of OneR's ablation with several seeds, evaluate it, and write the tables and their page.

    Each run is a run folder of the ordinary trainer. The same command continues after a kill at any moment, and no
    finished run is repeated; further seeds and rows are added to those that are there.
    """

    data: str = ""
    """Data in any form that --train-data takes, with a validation split; the recipe's own by default."""
    val_data: str = ""
    """Data to evaluate on, where --data has no validation split."""
    recipe: str = recipes.DEFAULT
    """The recipe of OneR that each row changes: a name, or FILE.py:NAME for one of your own."""
    rows: tuple[str, ...] = ("main", "factors")
    """Rows or groups of rows: main, factors, scale, decisive; --list names all rows."""
    seeds: int = 3
    """Number of seeds of each row, counted from 0."""
    equal: tuple[Literal["steps", "flops"], ...] = ("steps", "flops")
    """Comparisons: at equal steps, at equal operations, or both; factors are compared at equal steps."""
    steps: int | None = None
    """Steps of a run at equal steps; the recipe's own by default."""
    quick: bool = False
    """Try the command out: tiny models and a few steps, whose figures mean nothing."""
    out: Path | None = None
    """The study's folder; runs/ablation by default, runs/ablation-quick with --quick."""
    threads: int | Literal["auto"] = "auto"
    """Threads of each training, as of `oner-fast train`."""
    device: str = "auto"
    """Device of each training and evaluation."""
    list: bool = False
    """Print the plan with its steps and operations, and train nothing."""


def main(argv: Sequence[str]) -> int:
    """Run `oner` or `uta`; returns the exit status, as `oner_fast.boundary` lists them, or that of a signal."""
    if argv[:1] == ["uta"]:
        return uta_cli.main(argv[1:])
    return guarded(
        PROG, lambda: _run(argv[1:]), extra="demo", interrupted="interrupted; the same command continues from there"
    )


def _run(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, args=[*argv], prog=PROG)
    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {options.seeds}")
    if not options.equal:
        raise ValueError("--equal needs steps, flops or both")
    out = options.out or Path("runs/ablation-quick" if options.quick else "runs/ablation")
    settings = Settings(options.recipe, options.data, options.val_data, options.steps, options.quick)
    check_settings(out, settings)
    rows = chosen_rows(options.rows)
    planned = [_on(each, options) for each in plan(settings, rows, options.equal, range(options.seeds), out)]
    check_runs(_with_earlier(planned, settings, out))
    if options.list:
        print("\n".join(_listing(planned)))
        return 0
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("oner_fast").setLevel(logging.INFO)  # and not that of open_clip, which tells of every file
    begin(out, settings)
    command = shlex.join([*PROG.split(), *argv])
    status, written = 0, time.monotonic()
    try:
        for _ in run_all(planned, _say):
            if time.monotonic() - written > _PAGE_EVERY:
                write(out, _with_earlier(planned, settings, out), settings, command)
                written = time.monotonic()
    except Interrupted as stopped:
        status = stopped.status
    page = write(out, _with_earlier(planned, settings, out), settings, command)
    print(f"wrote {page}, {page.with_suffix('.md')} and {page.with_suffix('.json')}")
    if status:
        print(f"{PROG}: stopped; the same command continues from there", file=sys.stderr)
    return status


def _with_earlier(planned: Sequence[PlannedRun], settings: Settings, out: Path) -> list[PlannedRun]:
    """Add what is done of other rows, seeds and comparisons in the folder, so that the tables hold the whole study."""
    found = [int(match[1]) for path in out.glob("runs/*") if (match := _SEED.fullmatch(path.name))]
    seeds = range(max([*(each.seed for each in planned), *found]) + 1)
    asked = {(each.row.name, each.equal, each.seed) for each in planned}
    every = plan(settings, list(all_rows().values()), ("steps", "flops"), seeds, out)
    # A run that is the same in both comparisons does not make the one at equal operations.
    at_steps = {each.folder for each in every if each.equal == "steps"}
    own = {each.equal for each in planned} | {
        each.equal for each in every if each.equal == "steps" or (each.folder not in at_steps and is_done(each))
    }
    return [
        each
        for each in every
        if (each.row.name, each.equal, each.seed) in asked or (each.equal in own and is_done(each))
    ]


def _on(run: PlannedRun, options: Options) -> PlannedRun:
    """Give a run the machine's settings, which are no settings of the study."""
    settings = replace(run.config.run, threads=options.threads, device=options.device, resume="latest")
    return replace(run, config=replace(run.config, run=settings))


def _say(line: str) -> None:
    print(f"\n=== {line}", flush=True)


def _listing(planned: Sequence[PlannedRun]) -> list[str]:
    """Describe the plan in aligned lines, one for each row and comparison."""
    groups: dict[tuple[str, Equal], list[PlannedRun]] = {}
    for each in planned:
        groups.setdefault((each.row.name, each.equal), []).append(each)
    wide = max(len(name) for name, _ in groups) + 2
    lines = [
        f"{'row':<{wide}}{'compared at':<18}{'steps':>7}{'FLOPs a pair':>14}{'FLOPs a run':>13}{'done':>8}  changes"
    ]
    for (name, equal), runs in groups.items():
        first = runs[0]
        done = f"{sum(is_done(each) for each in runs)}/{len(runs)}"
        lines.append(
            f"{name:<{wide}}{EQUAL[equal]:<18}{first.config.optim.steps:>7,}{flops(first.pair_flops):>14}"
            f"{flops(first.flops):>13}{done:>8}  {first.row.title}"
        )
    every = distinct(planned)
    left = [each for each in every if not is_done(each)]
    cost = f"; the others take {flops(sum(each.flops for each in left))}FLOPs" if left else ""
    lines.append(f"{len(every)} runs, {len(every) - len(left)} of them done{cost}")
    return lines
