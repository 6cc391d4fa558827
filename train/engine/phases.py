"""Take over the state of another run or continue one's own: what may differ, and what goes with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn, optim

from oner_fast.train.engine.lineage import Origin

# Settings of the data that change neither the samples nor their order: paths and speed.
FREE_DATA = ("workers", "train_data", "val_data", "val_split", "tokenizer")
_COMPARED_RUN = ("seed", "precision")


def differences(before: Any, now: Any) -> list[str]:
    """List the settings, as `name old -> new`, in which two configurations train differently.

    Paths, the loading of data, logging and the like are free.
    """
    found = []
    for part in dataclasses.fields(now):
        old, new = getattr(before, part.name), getattr(now, part.name)
        for each in dataclasses.fields(old):
            if part.name == "run" and each.name not in _COMPARED_RUN:
                continue
            if part.name == "data" and each.name in FREE_DATA:
                continue
            if getattr(old, each.name) != getattr(new, each.name):
                found.append(f"{each.name} {getattr(old, each.name)!r} -> {getattr(new, each.name)!r}")
    return found


def refuse_other_settings(checkpoint: Path, run: Path, changes: list[str]) -> None:
    """Refuse to continue a run with other settings than its own.

    Raises:
        ValueError: there are changes.
    """
    if changes:
        raise ValueError(f"{checkpoint} was trained with other settings ({'; '.join(changes)}); {_new_phase(run)}")


def done_already(steps: int, run: Path) -> str:
    """Say that a run has taken all of its steps, and how to train on."""
    return f"step {steps} of {steps} was done already; {_new_phase(run)}"


def beginning(origin: Origin) -> str:
    """Say what a run begins with."""
    if origin.kind == "weights":
        return f"begins with the weights of {origin.file}"
    return f"a new phase: begins with weights and optimiser state of {origin.file}, and counts steps from 0"


def _new_phase(run: Path) -> str:
    return (
        f"to train on, begin a new phase with --resume {run} --run-dir NEW (its optimiser's state goes with it), or "
        f"with --init-from {run} --run-dir NEW (its weights alone)"
    )


def refuse_other_parameters(
    checkpoint: Path, state: Mapping[str, Any], student: nn.Module, optimizer: optim.Optimizer, changes: list[str]
) -> None:
    """Refuse a new phase whose parameters are not those of the checkpoint, as the optimiser's state belongs to them.

    Raises:
        ValueError: a name or shape differs, or the parameters that learn.
    """
    before = {name: each.shape for name, each in state["student"].items() if isinstance(each, Tensor)}
    if before == {name: each.shape for name, each in student.state_dict().items()}:
        groups = state["optimizer"]["param_groups"]
        if [len(each["params"]) for each in groups] == [len(each["params"]) for each in optimizer.param_groups]:
            return
    raise ValueError(
        f"{checkpoint} was trained with other parameters than these settings have ({'; '.join(changes)}), and the "
        f"optimiser's state belongs to them; --init-from {checkpoint} takes the weights alone"
    )
