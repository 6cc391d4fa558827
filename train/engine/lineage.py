"""The runs and files that a run began from, in `lineage.json` and in each of its checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from oner_fast import bounded_json
from oner_fast.atomic import write_atomic
from oner_fast.format_version import FIELD, LINEAGE, check_format_version

FILE = "lineage.json"
Kind = Literal["weights", "phase", "continuation"]


@dataclass(frozen=True)
class Origin:
    """The file that a run began from.

    Attributes:
        kind: `weights` (`--init-from`); `phase` (`--resume` of another run with another schedule: its optimiser state
            too, and steps counted from 0); `continuation` (`--resume` of another run with the same settings).
        given: the argument, as an absolute path.
        file: the file that was read, as an absolute path.
        sha256: SHA-256 of its bytes, in hexadecimal.
        step: the steps that its training had done; None where the file does not say.
    """

    kind: Kind
    given: str
    file: str
    sha256: str
    step: int | None


def origin(kind: Kind, given: str, file: Path, step: int | None) -> Origin:
    """Describe `file`, which the argument `given` led to; its bytes are read once."""
    return Origin(kind, str(Path(given).absolute()), str(file.absolute()), digest(file), step)


def digest(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def to_json(lineage: Sequence[Origin]) -> str:
    """Return the origins, oldest first, as the text that a checkpoint keeps."""
    return json.dumps([asdict(each) for each in lineage])


def from_json(text: str, name: str) -> list[Origin]:
    """Read the text of `to_json`. Raises ValueError, which names `name`, where it is another text."""
    return _origins(bounded_json.loads(text, name), name)


def save(folder: Path, lineage: Sequence[Origin]) -> None:
    """Write the origins into the run's folder; nothing where there are none."""
    if lineage:
        text = json.dumps({FIELD: LINEAGE, "lineage": [asdict(each) for each in lineage]}, indent=2) + "\n"
        write_atomic(folder / FILE, lambda file: file.write(text.encode()))


def read(folder: Path) -> list[Origin]:
    """Read the origins of the run in `folder`, oldest first; empty where it began with new weights.

    Raises:
        ValueError: the file is damaged, or a newer version of oner_fast wrote it.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    values = bounded_json.load_object(path.read_bytes(), str(path))
    check_format_version(path, values.get(FIELD), LINEAGE)
    return _origins(values.get("lineage"), str(path))


def _origins(values: Any, name: str) -> list[Origin]:
    try:
        found = [Origin(**each) for each in values]
    except TypeError as error:
        raise ValueError(f"{name} is no list of the runs before this one: {error}") from error
    for one in found:
        texts = all(isinstance(each, str) for each in (one.kind, one.given, one.file, one.sha256))
        if not texts or (one.step is not None and type(one.step) is not int):
            raise ValueError(f"{name} is no list of the runs before this one: it holds {bounded_json.shown(one)}")
    return found
