"""Format versions of the files that oner_fast writes. A reader accepts every version up to its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONFIGURATION = 1
"""`config.json` of a run. Version 0 has no field `format_version`."""
CHECKPOINT = 1
"""`step-*.pt`, under `format`."""
MODEL = 1
"""`model.safetensors` and `lit_config.json`. Version 0 has no field `format_version`."""
CONTRAST = 1
"""`contrast.safetensors` of a run."""
EVALUATION = 1
"""`evaluation.json` of a run, under `about.format_version`. In version 0, entries do not state their `data`."""
ABLATION = 1
"""`study.json` and `ablation.json` of a study."""
RUN = 1
"""`run.json`."""
LINEAGE = 1
"""`lineage.json` of a run."""

FIELD = "format_version"


def check_format_version(path: Path | str, found: Any, supported: int) -> None:
    """Refuse a file that a newer version of oner_fast wrote.

    Args:
        path: the file, for the message.
        found: the version in the file, as an integer or as its text; None for a file without one, which is version 0.
        supported: the newest version that can be read.

    Raises:
        ValueError: the version is newer, or is not a version.
    """
    if found is None:
        return
    text = str(found) if isinstance(found, (int, str)) and not isinstance(found, bool) else ""
    version = int(text) if text.isdecimal() and len(text) <= 18 else None
    if version is None or version > supported:
        raise ValueError(
            f"{path} has format version {str(found)[:40]}, and this oner_fast reads versions up to {supported}: update "
            "oner_fast"
        )
