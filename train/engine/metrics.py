"""The run's metrics: `metrics.jsonl`, one object a logged step, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from oner_fast.atomic import write_atomic
from oner_fast.train.engine.tensorboard import Board, open_board

_log = logging.getLogger(__name__)
FILE = "metrics.jsonl"


class MetricLog:
    """Appends metrics to `folder/metrics.jsonl` and writes them to `folder/tensorboard`.

    A resumed run logs no step twice: entries after the checkpoint that it continues from are removed from both, from
    the JSON lines atomically.

    A line that cannot be written, on a full disk for instance, ends no run: one warning says so, and the line is
    written with the next one. A file holds whole lines only.

    Args:
        folder: the run; made where needed.
        resume_step: finished steps of the checkpoint that is continued, 0 for a new run. Lines with a higher
            step, and a last line that was cut short, are removed.
        tensorboard: whether to write TensorBoard events too, where the package is installed.
        enabled: False makes every method do nothing; give `world.is_main`.
    """

    def __init__(
        self, folder: Path | str, *, resume_step: int = 0, tensorboard: bool = True, enabled: bool = True
    ) -> None:
        self.path = Path(folder) / FILE
        self._file: int | None = None
        self._end = 0  # bytes of whole lines in the file
        self._waiting = b""
        self._board: Board | None = None
        if not enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _drop_after(self.path, resume_step)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end = os.fstat(self._file).st_size
        if tensorboard:
            self._board = open_board(self.path.parent / "tensorboard", resume_step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
            step: finished steps.
            metrics: numbers, strings, booleans, None, or tensors and arrays of one element. NaN and infinity
                are written as null, and the line's `nonfinite` lists their names.

        Raises:
            TypeError: a value of another type.
            ValueError: a metric is named `step` or `nonfinite`, or a tensor has several elements.
        """
        if self._file is None:
            return
        line: dict[str, Any] = {"step": int(step)}
        nonfinite = []
        for name, value in metrics.items():
            if name in ("step", "nonfinite"):
                raise ValueError(f"a metric cannot be named {name!r}: the line has that key already")
            line[name] = _plain(name, value)
            if isinstance(line[name], float) and not math.isfinite(line[name]):
                line[name] = None
                nonfinite.append(name)
        if nonfinite:
            line["nonfinite"] = nonfinite
        warned = bool(self._waiting)
        self._waiting += (json.dumps(line, allow_nan=False) + "\n").encode()
        error = self._append()
        if error is not None and not warned:
            _log.warning("%s cannot be written (%s); the run goes on, and later lines bring this one", self.path, error)
        if self._board is not None:
            scalars = {key: value for key, value in line.items() if key != "step" and isinstance(value, (int, float))}
            self._board.write(step, scalars)

    def _append(self) -> OSError | None:
        """Write the waiting lines behind the whole ones; return the error that kept some of them."""
        assert self._file is not None
        done = 0
        try:
            while done < len(self._waiting):
                done += os.pwrite(self._file, self._waiting[done:], self._end + done)
        except OSError as error:
            with contextlib.suppress(OSError):  # part of a line is overwritten next time; here a reader is spared it
                os.ftruncate(self._file, self._end)
            return error
        self._end, self._waiting = self._end + done, b""
        return None

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        if self._file is not None:
            error = self._append() if self._waiting else None
            if error is not None:
                lost = self._waiting.count(b"\n")
                _log.warning("the last %d lines of %s are lost: %s", lost, self.path, error)
            os.close(self._file)
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl`, or of the one in the run folder `path`.

    A last line that was cut short is left out.

    Raises:
        ValueError: a line before the last is not a JSON object with a step.
    """
    path = Path(path)
    return [line for _, line in _lines(path / FILE if path.is_dir() else path)]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    raw = path.read_bytes().splitlines(keepends=True)
    found = []
    for number, text in enumerate(raw, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("not an object with an integer step")
            if not text.endswith(b"\n"):
                raise ValueError("no end of line")
        except ValueError as error:
            if number == len(raw):
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
        found.append((text, line))
    return found


def _drop_after(path: Path, step: int) -> None:
    # A run that begins anew logs its step 0 again.
    kept = b"".join(text for text, line in _lines(path) if line["step"] <= step and step)
    if len(kept) != path.stat().st_size:
        write_atomic(path, lambda file: file.write(kept))


def _plain(name: str, value: Any) -> bool | int | float | str | None:
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"metric {name!r} must have one element: {error}") from error
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"metric {name!r} must be a number, a string or None, got {type(value).__name__}")
