"""`oner-fast ablate uta`: train students under each mask and without one, and write their tables."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from oner_fast.ablation import uta_pace
from oner_fast.ablation.command import PAGE_EVERY, every_seed, listing, say, show_warnings, with_earlier
from oner_fast.ablation.plan import PlannedRun
from oner_fast.ablation.study import Interrupted, begin, check_held_out, check_runs, check_settings, is_done, run_all
from oner_fast.ablation.tables import EQUAL
from oner_fast.ablation.uta_plan import TRAINED, Settings, TeacherSource, configured, plan, teacher_runs, teacher_source
from oner_fast.ablation.uta_report import write
from oner_fast.ablation.uta_rows import ROWS, UTARow, chosen_rows
from oner_fast.boundary import guarded
from oner_fast.train.uta import recipes

PROG = "oner-fast ablate uta"


@dataclass(frozen=True)
class Options:
    """Train UTA's student under each mask and without one, with several seeds, and write the tables and their page.

    Rows are compared at equal steps, equal operations and equal time; the teacher's part is counted. Each run is a run
    folder of the ordinary trainer. The same command continues after a kill at any moment, and no finished run is
    repeated; further seeds, rows and teachers are added to those that are there.
    """

    data: str = ""
    """Data in any form that --train-data takes, with a validation split; the recipe's own by default."""
    val_data: str = ""
    """Data to evaluate on, where --data has no validation split."""
    recipe: str = recipes.DEFAULT
    """The recipe of UTA that each row changes: a name, or FILE.py:NAME for one of your own."""
    teachers: tuple[str, ...] = ("clip", "lit")
    """Teachers: clip and lit are trained here by their recipes; anything else is taken as --teacher takes it."""
    rows: tuple[str, ...] = ("main",)
    """Rows or groups of rows: main, factors, or the name of a row; uta is always among them."""
    seeds: int = 3
    """Number of seeds of each row, counted from 0."""
    equal: tuple[Literal["steps", "flops", "time"], ...] = ("steps", "flops", "time")
    """Comparisons: at equal steps, at equal operations, at equal time; factors are compared at equal steps."""
    steps: int | None = None
    """Steps of UTA, and of every row at equal steps; the recipe's own by default."""
    knn: bool = False
    """Evaluate k-NN on drawing styles and concepts too."""
    cache: bool = True
    """Keep a teacher's tokens of one seed on disk until all rows of that seed are done (1.5 GB by the recipe)."""
    quick: bool = False
    """Try the command out: tiny models and a few steps, whose figures mean nothing."""
    out: Path | None = None
    """The study's folder; runs/ablation-uta by default, runs/ablation-uta-quick with --quick."""
    threads: int | Literal["auto"] = "auto"
    """Threads of each training, as of `oner-fast train`."""
    device: str = "auto"
    """Device of each training and evaluation."""
    list: bool = False
    """Print the plan with its steps and operations, and train nothing."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status, as `oner_fast.boundary` lists them, or that of a signal."""
    return guarded(
        PROG, lambda: _run(argv), extra="demo", interrupted="interrupted; the same command continues from there"
    )


def _run(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, args=[*argv], prog=PROG)
    for name in ("equal", "teachers"):
        if not getattr(options, name):
            raise ValueError(f"--{name} needs at least one word")
    if options.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {options.seeds}")
    out = options.out or Path("runs/ablation-uta-quick" if options.quick else "runs/ablation-uta")
    settings = Settings(options.recipe, options.data, options.val_data, options.steps, options.quick)
    check_settings(out, settings)
    rows = chosen_rows(options.rows)
    check_held_out(settings.base())
    teachers = [teacher_source(word, settings, out) for word in options.teachers]
    study = _Study(options, settings, rows, teachers, out)
    if options.list:
        print("\n".join(_listing(study.planned(uta_pace.read(out)), "time" in options.equal)))
        return 0
    show_warnings()
    begin(out, settings)
    return study.run(shlex.join([*PROG.split(), *argv]))


class _Study:
    """One call of the command."""

    def __init__(
        self,
        options: Options,
        settings: Settings,
        rows: Sequence[UTARow],
        teachers: Sequence[TeacherSource],
        out: Path,
    ) -> None:
        self.options, self.settings, self.rows, self.teachers, self.out = options, settings, rows, teachers, out

    def planned(self, pace: dict[str, float]) -> list[PlannedRun]:
        """Plan every run, the teachers' first, with the machine's settings; refuse runs of other settings."""
        seeds = range(self.options.seeds)
        students = plan(self.settings, self.rows, self.options.equal, seeds, self.teachers, self.out, pace)
        found = [self._on(each) for each in (*teacher_runs(self.teachers), *students)]
        check_runs(found)
        return found

    def whole(self, planned: Sequence[PlannedRun], pace: dict[str, float]) -> list[PlannedRun]:
        """Add what is done of other rows, seeds and teachers in the folder, so that the tables hold the whole study."""
        asked = {source.name for source in self.teachers}
        others = [
            teacher_source(word, self.settings, self.out)
            for word in TRAINED
            if word not in asked and (self.out / "runs" / f"{word}.teacher").is_dir()
        ]
        teachers = [*self.teachers, *others]
        seeds = every_seed(planned, self.out)
        students = plan(self.settings, ROWS, tuple(EQUAL), seeds, teachers, self.out, pace)
        return with_earlier(planned, [*teacher_runs(teachers), *students])

    def _on(self, run: PlannedRun) -> PlannedRun:
        config: Any = run.config
        settings = replace(config.run, threads=self.options.threads, device=self.options.device, resume="latest")
        config = replace(config, run=settings)
        if self.options.cache and hasattr(config, "alignment"):
            folder = self.out / "cache" / f"{run.row.name.partition('.')[0]}-seed{run.seed}"
            config = replace(config, alignment=replace(config.alignment, teacher_cache=str(folder)))
        return replace(run, config=config)

    def run(self, command: str) -> int:
        """Train the teachers, measure the pace, train the students, and write the results."""
        pace = uta_pace.read(self.out)
        planned, status = self.planned(pace), 0
        try:
            for _ in run_all([each for each in planned if each.row.group == "teachers"], say, knn=self.options.knn):
                pass
            pace = self._pace()
            planned = self.planned(pace)
            self._train(planned, pace, command)
        except Interrupted as stopped:
            status = stopped.status
        page = write(self.out, self.whole(planned, pace), self.settings, pace, command)
        print(f"wrote {page}, {page.with_suffix('.md')} and {page.with_suffix('.json')}")
        if status:
            print(f"{PROG}: stopped; the same command continues from there", file=sys.stderr)
        return status

    def _pace(self) -> dict[str, float]:
        base = self.settings.base()
        run = replace(base.run, threads=self.options.threads, device=self.options.device)
        configs = {
            row.towards(teacher.name).name: replace(configured(base, row, teacher), run=run)
            for teacher in self.teachers
            for row in self.rows
        }
        return uta_pace.measure(self.out, configs, say)

    def _train(self, planned: Sequence[PlannedRun], pace: dict[str, float], command: str) -> None:
        written = time.monotonic()
        for _ in run_all(planned, say, knn=self.options.knn):
            self._drop_caches(planned)
            if time.monotonic() - written > PAGE_EVERY:
                write(self.out, self.whole(planned, pace), self.settings, pace, command)
                written = time.monotonic()

    def _drop_caches(self, planned: Sequence[PlannedRun]) -> None:
        """Remove the cached tokens that no waiting run needs."""
        needed = {_cache(each) for each in planned if not is_done(each)}
        for folder in {_cache(each) for each in planned} - needed - {None}:
            shutil.rmtree(str(folder), ignore_errors=True)


def _cache(run: PlannedRun) -> str | None:
    alignment: Any = getattr(run.config, "alignment", None)
    return (alignment.teacher_cache if alignment is not None else None) or None


def _listing(planned: Sequence[PlannedRun], timed: bool) -> list[str]:
    """Describe the plan in lines; `timed` says whether rows at equal time were asked for."""
    lines = listing(planned, "an image")
    main = {each.row.name for each in planned if each.row.group == "main"}
    if timed and main != {each.row.name for each in planned if each.equal == "time"}:
        lines.append("other rows at equal time are planned once the pace is measured, after the teachers' training")
    return lines
