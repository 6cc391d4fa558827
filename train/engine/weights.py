"""The file of weights that `--init-from` names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oner_fast.train.engine import checkpoint, lineage
from oner_fast.train.engine.checkpoint_file import step_of
from oner_fast.train.engine.lineage import Origin


@dataclass(frozen=True)
class Weights:
    """The weights that a run begins with.

    Attributes:
        path: the file.
        before: the origins of the run that wrote it, oldest first.
        origin: what is recorded about the file.
    """

    path: Path
    before: list[Origin]
    origin: Origin

    @property
    def lineage(self) -> list[Origin]:
        """The origins of the run that begins with these weights, oldest first."""
        return [*self.before, self.origin]


def find_weights(source: str, names: Sequence[str]) -> Weights:
    """Find the weights of a run or a file.

    Args:
        source: a run's folder or a file.
        names: the names that a finished model may have in a run's folder. Where there is none of them, the newest
            checkpoint is taken.

    Raises:
        FileNotFoundError: there is no such run or file, or the run has neither a model nor a checkpoint.
    """
    given = Path(source)
    if not given.exists():
        raise FileNotFoundError(f"init_from {source!r}: there is no such run or file")
    path = _in_run(given, names) if given.is_dir() else given
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return Weights(path, lineage.read(run), lineage.origin("weights", source, path, step_of(path.name)))


def _in_run(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if (found := checkpoint.latest(folder / "checkpoints")) is None:
        raise FileNotFoundError(
            f"init_from {str(folder)!r}: the folder holds neither {' nor '.join(names)} nor a checkpoint; give a run "
            "that has saved something, or a file"
        )
    return found


def refuse_other_weights(source: str, names: Sequence[str], recorded: Sequence[Origin], run: Path) -> None:
    """Refuse to continue a run from its checkpoint where `--init-from` names other weights than those it began with.

    The same argument as at the start is taken without looking, also where its file is gone or has changed.

    Args:
        source: the argument of `--init-from`.
        names: as in `find_weights`.
        recorded: the origins of the run, oldest first.
        run: the run's folder.

    Raises:
        FileNotFoundError: as in `find_weights`.
        ValueError: the run began with other weights, or with new ones.
    """
    first = recorded[-1] if recorded and recorded[-1].kind == "weights" else None
    if first is not None and first.given == str(Path(source).absolute()):
        return
    if first is None or find_weights(source, names).origin.sha256 != first.sha256:
        began = "other weights" if first is None else f"the weights of {first.file}"
        raise ValueError(
            f"{run} holds a run that began with {began}; leave out --init-from {source} to continue it, or give a new "
            "--run-dir to begin with those weights"
        )
