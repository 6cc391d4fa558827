"""Read the files of a run folder, with a clear message where one is missing."""

import logging
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oner_fast.bounded_json import load_object
from oner_fast.data.dataset import PairDataset
from oner_fast.data.identity import SharedTar, shared_tars
from oner_fast.data.splits import exists, is_stream, open_split, splits_of
from oner_fast.format_version import CONFIGURATION, FIELD, check_format_version

logger = logging.getLogger("oner_fast.evaluation")

MAX_CONFIG = 1 << 20
"""Largest configuration, and largest line of metrics.jsonl, in bytes."""


def check_run(run: Path) -> None:
    """Raise FileNotFoundError unless `run` is a run folder with a model."""
    if not run.is_dir():
        raise FileNotFoundError(f"no run folder {run}; `oner-fast train` makes one")
    models = ("model.safetensors", "open_clip_config.json", "lit_config.json")
    if not any((run / name).is_file() for name in models) and not any((run / "checkpoints").glob("step-*.pt")):
        raise FileNotFoundError(
            f"{run} holds no model: neither model.safetensors nor a checkpoint in checkpoints/ nor a CLIP of open_clip "
            "(open_clip_config.json) nor a LiT (lit_config.json); has its training begun?"
        )


def read_config(run: Path) -> dict[str, Any]:
    """The run's resolved configuration; empty where there is none."""
    path = run / "config.json"
    if not path.is_file():
        return {}
    content = load_object(path.read_bytes(), str(path), max_bytes=MAX_CONFIG)
    check_format_version(path, content.get(FIELD), CONFIGURATION)
    return content


def recipe_of(config: dict[str, Any]) -> str | None:
    """Name of the recipe that a configuration began from; None where it names none."""
    run = config.get("run")
    named = config.get("recipe") or (run.get("recipe") if isinstance(run, dict) else None)
    return named if isinstance(named, str) else None


def find_data(run: Path, given: str | None) -> str:
    """Find the data to evaluate on: the given ones, else the run's `val_data`, else those that it was trained on.

    Raises:
        FileNotFoundError: the data do not exist; the message says what to give.
        ValueError: `given` is empty, as where a shell's variable is not set.
    """
    if given is not None:
        if not given:
            raise ValueError("--data is empty; name the data, or leave the flag out for the run's own")
        if not exists(given):
            raise FileNotFoundError(f"no data at {given} (given with --data)")
        return given
    return _of_run(run, ("val_data", "train_data", "path"))


def find_training_data(run: Path) -> str:
    """Find the data that a run was trained on. Raises as `find_data` does."""
    return _of_run(run, ("train_data", "path"))


def unnamed_split(run: Path, data: str) -> str:
    """Name of the only split of data that name none: "train" where the training read all of it, else "val"."""
    try:
        training = find_training_data(run)
    except FileNotFoundError:
        return "val"
    if data == training:
        return "train"
    given = open_split(data, "val", "val") if "val" in splits_of(data, "val") else None
    return "train" if given is not None and len(_shared(run, given)) == len(given.shards) else "val"


def refuse_training_pairs(run: Path, dataset: PairDataset) -> None:
    """Raise ValueError where a tar of a validation split was trained on, under this name or another.

    Where the training data are not there, one warning says that nothing was compared.
    """
    try:
        found = _shared(run, dataset)
    except FileNotFoundError as error:
        if read_config(run):
            logger.warning("whether %s holds training pairs is not known: %s", dataset.path, error)
        return
    if found:
        first, more = found[0], f", and so are {len(found) - 1} more" if len(found) > 1 else ""
        beside = "" if first.other == first.path else f" as {first.other}"
        raise ValueError(
            f"{run} was trained on {first.path} ({first.how}{beside}){more}, so that it is no validation data; give "
            "held-out data with --data, or --split train to look at the training pairs"
        )


def _shared(run: Path, dataset: PairDataset) -> list[SharedTar]:
    """Find the tars of a data set that a run was trained on. Raises FileNotFoundError where its data are not there."""
    named = read_config(run).get("data")
    split = named.get("train_split") if isinstance(named, dict) else None
    training = find_training_data(run)
    split = split if isinstance(split, str) else "train"
    if split not in splits_of(training, split):
        return []
    return shared_tars(dataset.indexes, open_split(training, split, split).indexes)


def _of_run(run: Path, keys: Sequence[str]) -> str:
    named = read_config(run).get("data")
    if isinstance(named, dict):
        named = next((named[key] for key in keys if isinstance(named.get(key), str) and named[key]), None)
    if not isinstance(named, str) or not named:
        raise FileNotFoundError(f"{run / 'config.json'} names no data; give its folder with --data")
    if is_stream(named):
        raise FileNotFoundError(f"{run} was trained on a stream, {named}; give other data with --data")
    for data in (named, str(run / named)):
        if exists(data):
            return data
    raise FileNotFoundError(f"the data of {run} are not at {named}; give their place with --data")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Logged steps of metrics.jsonl, by step; where a resumed run logged a step again, the later line counts.

    A line that is no JSON object with a step, such as one that a kill cut short, is left out.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    lines: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = load_object(line, str(path), max_bytes=MAX_CONFIG)
        except ValueError:
            continue
        step = entry.get("step")
        if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 53:
            lines[step] = entry
    return [lines[step] for step in sorted(lines)]


def processor() -> str:
    """Name of this machine's CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
