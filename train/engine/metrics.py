"""The run's metrics: `metrics.jsonl`, one object a logged step, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import logging
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from oner_fast.atomic import write_atomic
from oner_fast.remedies import install_command

_log = logging.getLogger(__name__)
FILE = "metrics.jsonl"


class MetricLog:
    """Appends metrics to `folder/metrics.jsonl` and writes them to `folder/tensorboard`.

    A resumed run logs no step twice: entries after the checkpoint that it continues from are removed from both, from
    the JSON lines atomically.

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
        self._file = None
        self._board: Any = None
        if not enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _drop_after(self.path, resume_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        if tensorboard:
            self._board = _board(self.path.parent / "tensorboard", resume_step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line and flush it.

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
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        if self._file is not None:
            self._file.close()
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


def _board(folder: Path, resume_step: int) -> Any:
    try:
        # Imported here, since the import takes a second and readers of metrics do not need it.
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.info("TensorBoard is not installed: metrics go to %s only (%s)", FILE, install_command("tensorboard"))
        return None
    # Events of purge_step and later, written before, are no longer shown.
    return SummaryWriter(str(folder), purge_step=resume_step + 1)


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
    kept = b"".join(text for text, line in _lines(path) if line["step"] <= step)
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
