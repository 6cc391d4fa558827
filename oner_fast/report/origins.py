"""The weights that a run began with, as pages and model cards name them."""

from __future__ import annotations

from pathlib import Path

from oner_fast.train.engine import lineage
from oner_fast.train.engine.lineage import Origin


def origins(run: Path) -> list[Origin]:
    """List the weights that a run and the runs before it began with, oldest first; empty where all were new.

    A run that was continued in another folder is one run. Raises ValueError where `lineage.json` is damaged.
    """
    return [one for one in lineage.read(run) if one.kind != "continuation"]


def run_of(origin: Origin) -> Path:
    """Return the folder of the run that wrote the weights; it may be gone."""
    folder = Path(origin.file).parent
    return folder.parent if folder.name == "checkpoints" else folder


def described(origin: Origin) -> str:
    """Name the weights by run, file and step, without the folders of this machine."""
    after = f", after {origin.step:,} steps" if origin.step is not None else ""
    return f"{run_of(origin).name}/{Path(origin.file).name}{after}"
