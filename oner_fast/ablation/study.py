"""Run a study: each run is a run folder of the ordinary trainer, so that a kill at any moment loses nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oner_fast.ablation.plan import PlannedRun, Trained
from oner_fast.atomic import write_atomic
from oner_fast.bounded_json import load_object
from oner_fast.data.splits import exists, splits_of
from oner_fast.evaluation import cli as evaluation
from oner_fast.evaluation.folder import read_config
from oner_fast.evaluation.record import ABOUT, MODELS, model_digest, read_record
from oner_fast.evaluation.record import FILE as EVALUATION
from oner_fast.format_version import ABLATION, FIELD, check_format_version
from oner_fast.train.clip.settings import CLIPConfiguration
from oner_fast.train.clip.training import CLIPTraining
from oner_fast.train.config.serialization import to_dict
from oner_fast.train.engine.launch import train
from oner_fast.train.engine.run_lock import RunInUse
from oner_fast.train.lit.settings import LiTConfiguration
from oner_fast.train.lit.training import LiTTraining
from oner_fast.train.oner.training import OneRTraining
from oner_fast.train.uta.settings import UTAConfiguration
from oner_fast.train.uta.training import UTATraining

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FILE = "study.json"
_OPEN = {"model": ("vocab_size",), "data": ("workers", "verify_data"), "alignment": ("teacher_cache",)}
"""Settings that the data decide, or that change no weight."""


def check_settings(out: Path, settings: DataclassInstance) -> None:
    """Compare the settings of a study with those in its folder; a study of which no run has begun may change them.

    Raises:
        ValueError: the folder holds a study with other settings, or the file is damaged.
    """
    path = out / FILE
    if not path.is_file() or not any(out.glob("runs/*/config.json")):
        return
    try:
        found = load_object(path.read_bytes(), str(path))
    except ValueError as error:
        raise ValueError(f"{error}; remove it, and the same command writes it again") from error
    check_format_version(path, found.pop(FIELD, None), ABLATION)
    asked = asdict(settings)
    changed = [f"{name} {found.get(name)!r} -> {value!r}" for name, value in asked.items() if found.get(name) != value]
    if changed:
        raise ValueError(
            f"{out} holds a study with other settings ({'; '.join(changed)}): give those of before, or another --out"
        )


def check_held_out(config: Trained, split: str | None = None) -> None:
    """Refuse data without a split to evaluate on, before anything is trained.

    Args:
        config: the configuration that every row changes.
        split: the split whose figures the tables hold; any but `train` where None.

    Raises:
        FileNotFoundError: the data of --val-data are not there.
        ValueError: the data have no such split.
    """
    data: Any = config.data
    if data.val_data and not exists(data.val_data):
        raise FileNotFoundError(f"no data at {data.val_data} (given with --val-data)")
    found = data.val_data or data.train_data
    known = splits_of(found, "val" if data.val_data else "train")
    if not [name for name in known if (name == split if split else name != "train")]:
        needed = f"split {split!r}, whose figures the tables hold" if split else "split that is held out"
        raise ValueError(f"{found} has no {needed}; it has {', '.join(known)}: give --val-data")


def begin(out: Path, settings: DataclassInstance) -> None:
    """Record the settings of a study in its folder, which is made where needed."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({FIELD: ABLATION, **asdict(settings)}, indent=2) + "\n"
    write_atomic(out / FILE, lambda file: file.write(text.encode()))


def check_runs(planned: Sequence[PlannedRun]) -> None:
    """Compare the runs that are there with the plan.

    Raises:
        ValueError: a run was trained with other settings than the plan's, for instance those of another version.
    """
    for each in planned:
        before, now = read_config(each.folder), to_dict(each.config)
        changed = [
            f"{part}.{name} {before[part].get(name)!r} -> {value!r}"
            for part in ("model", "objectives", "contrast", "alignment", "data", "optim")
            if isinstance(before.get(part), dict)
            for name, value in now.get(part, {}).items()
            if name not in _OPEN.get(part, ()) and name in before[part] and before[part][name] != value
        ]
        if changed:
            raise ValueError(
                f"{each.folder} was trained with other settings ({'; '.join(changed[:3])}): move it away to train it "
                "anew, or give another --out"
            )


def is_done(run: PlannedRun) -> bool:
    """Tell whether a run is trained to the end and evaluated."""
    digest = _digest(run.folder)
    if digest is None:
        return False
    about = read_record(run.folder).get(ABOUT)
    return isinstance(about, dict) and about.get("model") == digest


def _digest(folder: Path) -> str | None:
    """Return the SHA-256 of a run's model, which is computed again only where its file has changed."""
    files = [path for name in MODELS if (path := folder / name).is_file()]
    stamps = tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in files)
    return _computed_digest(folder, stamps) if files else None


@cache
def _computed_digest(folder: Path, stamps: tuple[tuple[int, int], ...]) -> str | None:
    return model_digest(folder)


def distinct(planned: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return the runs in order, each folder once: the reference row is the same run in both comparisons."""
    found: dict[Path, PlannedRun] = {}
    for each in planned:
        found.setdefault(each.folder, each)
    return list(found.values())


class Interrupted(Exception):
    """A signal ended a run, which saved. `status` is the exit status that says so."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


def waiting_runs(planned: Sequence[PlannedRun]) -> list[tuple[int, int, PlannedRun]]:
    """Return the runs that are not done, each with its number and the number of all runs."""
    every = distinct(planned)
    waiting = [each for each in every if not is_done(each)]
    return [(number, len(every), each) for number, each in enumerate(waiting, start=1 + len(every) - len(waiting))]


def run_all(planned: Sequence[PlannedRun], say: Callable[[str], None], *, knn: bool = False) -> Iterator[PlannedRun]:
    """Train and evaluate the runs that are not done, one after another; yield each that becomes done.

    Args:
        planned: the runs.
        say: shows a line.
        knn: evaluate k-NN too.

    Raises:
        Interrupted: a signal ended a run; its last step is saved.
    """
    waiting = waiting_runs(planned)
    done, left, spent = 0.0, sum(run.flops for _, _, run in waiting), 0.0
    for number, total, run in waiting:
        ahead = f"; about {duration(left * spent / done)} to go" if done else ""
        say(f"run {number} of {total}: {run.described}{ahead}")
        began = time.perf_counter()
        if status := train_and_evaluate(run, knn):
            raise Interrupted(status)
        spent, done, left = spent + time.perf_counter() - began, done + run.flops, left - run.flops
        yield run


def train_and_evaluate(run: PlannedRun, knn: bool = False) -> int:
    """Train a run from where it stands and evaluate it; returns 0, or the status of the signal that ended it."""
    try:
        status = _train(run)
    except RunInUse as error:
        raise RunInUse(f"{error}; of a study, another --out") from error
    if status:
        return status
    evaluation.evaluate(evaluation.Options(run=run.folder, device=_device(run), knn=knn))
    return 0


def _train(run: PlannedRun) -> int:
    if _digest(run.folder) is not None:
        return 0  # it was killed between training and evaluation
    if isinstance(run.config, CLIPConfiguration):
        return train(run.config, CLIPTraining)
    if isinstance(run.config, LiTConfiguration):
        return train(run.config, LiTTraining)
    if isinstance(run.config, UTAConfiguration):
        return train(run.config, UTATraining)
    return train(run.config, OneRTraining)


def _device(run: PlannedRun) -> str:
    import torch

    asked = run.config.run.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def duration(seconds: float) -> str:
    """Say a time in minutes, or in hours from 100 minutes on."""
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def figures_of(run: PlannedRun) -> dict[str, Any] | None:
    """Read the figures of a done run's validation split; None of a run that is not done.

    Raises ValueError where the evaluation has no such figures.
    """
    if not is_done(run):
        return None
    entry = read_record(run.folder).get("val")
    if not isinstance(entry, dict):
        raise missing_figure(run, "no entry 'val'")
    return entry


def missing_figure(run: PlannedRun, what: object) -> ValueError:
    """Say that the evaluation of a run lacks a figure, and what to do."""
    return ValueError(
        f"{run.folder / EVALUATION} lacks a figure of the study ({what}); remove the file, and the same command "
        "evaluates the run again"
    )
