"""The C++ extension: loaded once, and where it is missing, why, and how to get it."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
REINSTALL = (
    "pip install setuptools wheel cmake ninja pybind11, then install oner_fast again with "
    "'pip install --no-build-isolation --force-reinstall --no-deps'"
)


@dataclass(frozen=True)
class Status:
    """Whether the compiled ops are in use; if not, the reason and the remedy."""

    loaded: bool
    reason: str = ""
    remedy: str = ""


def library_path() -> Path:
    """Where the extension is: in the package, or, for another build of it, where ONER_FAST_LIBRARY says."""
    return Path(os.environ.get("ONER_FAST_LIBRARY") or _FOLDER / "_C.so")


def build_report() -> dict[str, Any]:
    """What the build wrote about itself (_build.json beside the library); empty where nothing was built."""
    try:
        report = json.loads((library_path().parent / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


_status: Status | None = None
_warned = False


def status() -> Status:
    """Whether the extension is there; loads it at the first call."""
    global _status
    if _status is None:
        _status = _load()
    return _status


def _load() -> Status:
    report = build_report()
    library = library_path()
    if not library.exists():
        built = report.get("extension", {})
        reason = built.get("reason") or "the package was never built (it is used from its source folder)"
        return Status(False, f"the C++ extension is not built: {reason}", built.get("remedy") or REINSTALL)
    built_for = report.get("torch", "an unknown version")
    if built_for != str(torch.__version__):
        reason = f"the C++ extension was built for torch {built_for}, this is torch {torch.__version__}"
        return Status(False, reason, REINSTALL)
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return Status(False, f"the C++ extension could not be loaded: {error}", REINSTALL)
    return Status(True)


def warn_if_missing() -> None:
    """Say once in a process that an op runs slower than it could, and what to do about it."""
    global _warned
    state = status()
    if not state.loaded and not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            f"oner_fast runs its plain PyTorch definitions: {state.reason}. Remedy: {state.remedy}. "
            "'oner-fast doctor' shows more.",
            RuntimeWarning,
            stacklevel=3,
        )
