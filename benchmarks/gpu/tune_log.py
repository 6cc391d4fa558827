"""The log of a tuning: a JSON line for each tile that was compiled, refused, timed or decided on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import oner_fast.kernels
from oner_fast.benchmarks.gpu.machine_code import versions
from oner_fast.kernels.launch import Configuration
from oner_fast.kernels.tile_overrides import Key


def _digest() -> str:
    """Hash of the kernel sources; entries from other sources are stale."""
    folder = Path(oner_fast.kernels.__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()[:12]


class Log:
    """A log that appends to a file, line by line, and reads the earlier lines.

    Decisions made on another GPU do not count here, and lines from other compilers or kernel sources are ignored. All
    lines stay in the file. A last line that an interruption left unfinished is dropped.

    Args:
        path: path of the file; its folder is made.
        gpu: name of the GPU that times; empty where none does.
        architecture: 80 for sm_80.

    Raises:
        ValueError: a line of the file, other than the last, is not a record of a tuning.
    """

    def __init__(self, path: Path, gpu: str, architecture: int) -> None:
        self.path, self.gpu, self.architecture = path, gpu, f"sm_{architecture}"
        self.compiler = f"{versions()}, kernels {_digest()}"
        self.records: list[dict[str, Any]] = []
        self._file: TextIO | None = None

    def __enter__(self) -> Log:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole, _, rest = text.rpartition("\n")
        for number, line in enumerate(whole.split("\n") if whole else [], 1):
            try:
                record = json.loads(line)
                self.records.append({**record, "key": tuple(record["key"])})
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}: not a record of gpu-tune ({error!r})") from error
        if rest:
            self.path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, kind: str, key: Key, tile: Configuration, **more: Any) -> None:
        """Write one record, which is on the disk when this returns."""
        assert self._file is not None, "the log is not open"
        record = {
            "kind": kind, "key": key, "tile": tile.numbers, "architecture": self.architecture, "gpu": self.gpu,
            "compiler": self.compiler, **more,
        }  # fmt: skip
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def settled(self, key: Key, tile: Configuration, changes: int) -> bool:
        """Whether a run on this GPU found no better tile among all that differ from this one in `changes` numbers."""
        return any(
            one["chosen"] == tile.numbers and one["changes"] >= changes
            for one in self._about("decided", key, tile)
            if one["gpu"] == self.gpu and one["architecture"] == self.architecture
        )

    def compiled(self, key: Key, tile: Configuration, targets: Sequence[str]) -> list[str] | None:
        """Problems that a tile was found to have on these targets; None where it was not compiled for them."""
        for one in self._about("compiled", key, tile):
            if one["targets"] == list(targets):
                return list(one["problems"])
        return None

    def _about(self, kind: str, key: Key, tile: Configuration) -> list[dict[str, Any]]:
        return [
            one
            for one in self.records
            if one["kind"] == kind and one["key"] == key and one["tile"] == tile.numbers
            and one["compiler"] == self.compiler
        ]  # fmt: skip
