"""The pace of the study's runs on this machine, measured once and kept in the study's folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from oner_fast.atomic import write_atomic
from oner_fast.bounded_json import load_object
from oner_fast.evaluation.folder import processor
from oner_fast.format_version import ABLATION, FIELD, check_format_version
from oner_fast.train.engine import distributed
from oner_fast.train.engine.allocator import freed_memory_kept
from oner_fast.train.engine.dry_run import dry_run
from oner_fast.train.uta.settings import UTAConfiguration
from oner_fast.train.uta.training import UTATraining

FILE = "pace.json"
ROUNDS = 5


def read(out: Path) -> dict[str, float]:
    """Read the seconds a step of each row that was measured; empty where none was.

    Raises:
        ValueError: the file is damaged, or a newer version wrote it.
    """
    path = out / FILE
    if not path.is_file():
        return {}
    found = load_object(path.read_bytes(), str(path))
    check_format_version(path, found.get(FIELD), ABLATION)
    seconds = found.get("seconds_a_step")
    if not isinstance(seconds, dict) or not all(_is_pace(each) for each in seconds.values()):
        raise ValueError(f"{path} must hold positive numbers under 'seconds_a_step'; remove it to measure again")
    return {name: float(each) for name, each in seconds.items()}


def _is_pace(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def measure(out: Path, configs: Mapping[str, UTAConfiguration], say: Callable[[str], None]) -> dict[str, float]:
    """Measure the rows that were not measured, in turns, and keep the median of the rounds.

    A step is a whole one, with the teacher's tokens computed. Rows in turns meet the same disturbances, and the median
    leaves out single ones; on a busy machine the figures still mean little.

    Args:
        out: the study's folder.
        configs: the configuration of each row, by name.
        say: shows a line.

    Returns:
        Seconds a step of every row that was ever measured.
    """
    known = read(out)
    missing = {name: config for name, config in configs.items() if name not in known}
    if not missing:
        return known
    say(f"the pace of {len(missing)} rows, in turns, {ROUNDS} times")
    rounds: dict[str, list[float]] = {name: [] for name in missing}
    for _ in range(ROUNDS):
        for name, config in missing.items():
            rounds[name].append(_seconds(config, out))
    known |= {name: median(seconds) for name, seconds in rounds.items()}
    about = {FIELD: ABLATION, "seconds_a_step": known, "processor": processor()}
    text = json.dumps(about, indent=2) + "\n"
    write_atomic(out / FILE, lambda file: file.write(text.encode("utf-8", "replace")))
    return known


def _seconds(config: UTAConfiguration, out: Path) -> float:
    torch.use_deterministic_algorithms(config.run.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    world = distributed.setup(config.run.device, timeout_seconds=config.run.collective_timeout)
    try:
        with freed_memory_kept(), tempfile.TemporaryDirectory(prefix=".pace-", dir=out) as folder:
            placed = replace(config, run=replace(config.run, run_dir=str(Path(folder) / "run")))
            return dry_run(placed, UTATraining, world).seconds_per_step
    finally:
        distributed.shutdown()
