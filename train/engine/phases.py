"""Take over the state of another run or continue one's own: what may differ, and what goes with it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn, optim

from oner_fast.train.config.common import Run
from oner_fast.train.config.serialization import from_dict
from oner_fast.train.engine.distributed import World, on_main
from oner_fast.train.engine.lineage import Kind, Origin, origin
from oner_fast.train.engine.resuming import Start
from oner_fast.train.engine.weights import Weights, find_weights, refuse_other_weights

_KEYS = {"student", "optimizer", "guard", "data", "config", "random"}
# Settings of the data that change neither the samples nor their order: paths and speed.
FREE_DATA = ("workers", "train_data", "val_data", "val_split", "tokenizer")
_COMPARED_RUN = ("seed", "precision")


C = TypeVar("C")


def saved_configuration(name: str, state: dict[str, Any], kind: type[C]) -> C:
    """Read the configuration in a checkpoint, and refuse the checkpoint of something else."""
    if missing := _KEYS - state.keys():
        raise ValueError(f"{name} is no checkpoint of a training: it lacks {', '.join(sorted(missing))}")
    try:
        return from_dict(kind, json.loads(state["config"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is a checkpoint of another kind of training: {error}") from error


def is_done(before: Any, state: dict[str, Any] | None) -> bool:
    """Tell whether a checkpoint is that of the last step, so that a run elsewhere cannot continue it."""
    return state is not None and int(state["step"]) >= before.optim.steps


def weights_to_begin_with(run: Run, start: Start, names: Sequence[str], title: str, world: World) -> Weights | None:
    """Find the weights that `--init-from` names; None without it, and where a checkpoint is there to continue from.

    Args:
        run: the settings.
        start: the place where the run begins.
        names: names of a finished model's file; none where the training takes no weights.
        title: the training's name.
        world: this process's place among the ranks, all of which call this.

    Raises:
        FileNotFoundError: there is no such run or file.
        ValueError: the training takes no weights, or `--resume` names another run as well.
    """
    if not run.init_from:
        return None
    if not names:
        raise ValueError(f"oner-fast train {title} takes no --init-from: its encoders come with their weights")
    if start.foreign:
        raise ValueError(
            f"give either --resume {run.resume} (weights and optimiser state) or --init-from {run.init_from} "
            "(weights alone), not both"
        )
    return None if start.path is not None else on_main(world, lambda: find_weights(run.init_from, names))


def lineage_of(
    run: Run,
    start: Start,
    state: dict[str, Any],
    before: list[Origin],
    names: Sequence[str],
    phase: bool,
    world: World,
) -> list[Origin]:
    """Return the origins, oldest first, of a run that begins with a checkpoint.

    Args:
        run, start, names, world: as in `weights_to_begin_with`.
        state: the checkpoint.
        before: the origins in it.
        phase: whether a new phase begins.

    Raises:
        ValueError: the run is to be continued, and `--init-from` names other weights than those that it began with.
    """
    path = start.path
    assert path is not None
    if run.init_from:
        on_main(world, lambda: refuse_other_weights(run.init_from, names, before, Path(run.run_dir)))
    if not start.foreign:
        return before
    kind: Kind = "phase" if phase else "continuation"
    return [*before, on_main(world, lambda: origin(kind, run.resume, path, int(state["step"])))]


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


def beginning(first: Origin) -> str:
    """Say what a run begins with."""
    if first.kind == "weights":
        return f"begins with the weights of {first.file}"
    return f"a new phase: begins with weights and optimiser state of {first.file}, and counts steps from 0"


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
