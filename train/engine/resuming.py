"""The checkpoint that a run continues from, and what becomes of damaged ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from oner_fast.failures import is_out_of_memory, origin
from oner_fast.train.engine import checkpoint, lineage
from oner_fast.train.engine.lost_ranks import is_collective

_log = logging.getLogger(__name__)


@dataclass
class Start:
    """The place where a run begins.

    Attributes:
        path: the checkpoint to continue from; None starts afresh.
        damaged: the damaged checkpoints of the run's own folder that are newer, with a sentence about each.
        foreign: whether the checkpoint lies outside of the run's own folder.
    """

    path: Path | None
    damaged: dict[Path, str] = field(default_factory=dict)
    foreign: bool = False

    def set_aside(self) -> None:
        """Move the damaged checkpoints aside and say so in one line each.

        Those that cannot be moved stay in `damaged`.
        """
        for path, reason in list(self.damaged.items()):
            older = f"the run goes on from {self.path.name}" if self.path else "the run starts afresh"
            try:
                place = checkpoint.set_aside(path)
            except OSError as error:
                _log.warning("%s; it cannot be moved aside (%s), and %s", reason, error.strerror, older)
            else:
                del self.damaged[path]
                _log.warning("%s; it is now %s, and %s", reason, place.name, older)


@contextmanager
def restoring(path: Path | None) -> Iterator[None]:
    """Turn an error inside, where the state of the checkpoint `path` is taken over, into a sentence about the file.

    A checkpoint can be whole and hold another state than this training needs: another version wrote it, or a script
    changed it. A refusal of this library passes as it is, and so does a lack of memory. With `path` None nothing is
    restored, and every error passes.

    Raises:
        ValueError: the state does not fit.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        lost = isinstance(error, RuntimeError) and is_collective(error)
        if path is None or lost or is_out_of_memory(error) or origin(error).refused:
            raise
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} does not fit this training ({type(error).__name__}: {said}): another version wrote it, or it was "
            "changed; remove it to go on from the one before, or give another --run-dir"
        ) from error


def find_start(folder: Path, resume: str) -> Start:
    """Find the checkpoint to continue from. Nothing is changed.

    Args:
        folder: the run's checkpoints.
        resume: `latest` (a start afresh where there is none yet), `none`, or the path of a checkpoint, of a folder
            of checkpoints or of a run. Where the run began from that path, it is continued as with `latest`, so that
            the same command goes on after an interruption.

    Raises:
        FileNotFoundError: `resume` is a path without a checkpoint.
        DamagedCheckpoint: the named checkpoint is damaged, or all checkpoints of the folder are.
        ValueError: `folder` holds a newer whole checkpoint, which would be mistaken for this run's.
    """
    every = checkpoint.saved(folder)
    start = _find(folder, "latest" if every and _began_from(folder.parent, resume) else resume)
    for path in reversed(every):
        if path in start.damaged:
            continue
        if start.path is not None and start.path.resolve() == path.resolve():
            break
        try:
            checkpoint.check(path)
        except checkpoint.DamagedCheckpoint as error:
            start.damaged[path] = str(error)
        else:
            raise ValueError(
                f"{folder} holds {len(every)} checkpoints up to {path.name}; "
                "resume with --resume latest, or give another --run-dir"
            )
    return start


def _find(folder: Path, resume: str) -> Start:
    if resume == "none":
        return Start(None)
    if resume == "latest":
        return Start(*checkpoint.search(folder))
    path = Path(resume)
    if path.is_file():
        checkpoint.check(path)
        return Start(path, foreign=path.parent.resolve() != folder.resolve())
    inner = path / "checkpoints"
    inside = inner if inner.is_dir() else path
    if inside.is_dir() and folder.is_dir() and inside.samefile(folder):
        return Start(*checkpoint.search(folder))
    found = checkpoint.latest(inside)  # another run's folder: nothing in it is moved
    if found is None:
        raise FileNotFoundError(
            f"resume {resume!r}: no checkpoint there; give latest, none, or the path of a step-*.pt file or a run"
        )
    return Start(found, foreign=True)


def _began_from(run: Path, resume: str) -> bool:
    """Tell whether the run in the folder `run` began with `--resume` of this path."""
    if resume in ("latest", "none"):
        return False
    before = lineage.read(run)
    return bool(before) and before[-1].kind != "weights" and Path(before[-1].given).resolve() == Path(resume).resolve()
