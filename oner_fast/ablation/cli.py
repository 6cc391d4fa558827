"""`oner-fast ablate oner`: train and evaluate each row of the ablation, and write tables; `uta` is in `uta_cli`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from oner_fast.ablation import uta_cli
from oner_fast.ablation.command import PAGE_EVERY, every_seed, listing, say, show_warnings, with_earlier
from oner_fast.ablation.jobs import run_at_once
from oner_fast.ablation.plan import PlannedRun, Settings, plan
from oner_fast.ablation.report import write
from oner_fast.ablation.rows import GROUPS, all_rows, chosen_rows
from oner_fast.ablation.study import Interrupted, begin, check_held_out, check_runs, check_settings, run_all
from oner_fast.boundary import guarded
from oner_fast.train.oner import recipes

PROG = "oner-fast ablate oner"


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
    jobs: int = 1
    """Runs that are trained at a time, each with its share of the cores; their output goes into OUT/logs."""
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
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    if not options.equal:
        raise ValueError("--equal needs steps, flops or both")
    if not options.rows:
        raise ValueError(
            f"--rows needs a row or a group; the groups are {', '.join(GROUPS)}, and --list names the rows"
        )
    out = options.out or Path("runs/ablation-quick" if options.quick else "runs/ablation")
    settings = Settings(options.recipe, options.data, options.val_data, options.steps, options.quick)
    check_settings(out, settings)
    rows = chosen_rows(options.rows)
    if "steps" not in options.equal and all(row.group != "main" for row in rows):
        raise ValueError(
            f"--rows {' '.join(options.rows)} names factors, which are compared at equal steps alone: "
            "give --equal steps"
        )
    check_held_out(settings.base(), "val")
    planned = [_on(each, options) for each in plan(settings, rows, options.equal, range(options.seeds), out)]
    check_runs(_with_earlier(planned, settings, out))
    if options.list:
        print("\n".join(listing(planned, "a pair")))
        return 0
    show_warnings()
    begin(out, settings)
    command = shlex.join([*PROG.split(), *argv])
    status, written = 0, time.monotonic()
    try:
        for _ in run_all(planned, say) if options.jobs == 1 else run_at_once(planned, options.jobs, out, say):
            if time.monotonic() - written > PAGE_EVERY:
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
    every = plan(settings, list(all_rows().values()), ("steps", "flops"), every_seed(planned, out), out)
    return with_earlier(planned, every)


def _on(run: PlannedRun, options: Options) -> PlannedRun:
    """Give a run the machine's settings, which are no settings of the study."""
    settings = replace(run.config.run, threads=options.threads, device=options.device, resume="latest")
    return replace(run, config=replace(run.config, run=settings))
