"""Load the C++ extension once; where it is missing, say why and how to get it.

The extension uses PyTorch's stable ABI alone. One build serves the oldest torch that it was built for, and all newer
ones.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oner_fast.remedies import build_command

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Status:
    """Whether the compiled ops are loaded; if not, the reason and the remedy."""

    loaded: bool
    reason: str = ""
    remedy: str = ""


def library_path() -> Path:
    """Path of the extension: in the package, or the path in ONER_FAST_LIBRARY, which names another build."""
    return Path(os.environ.get("ONER_FAST_LIBRARY") or _FOLDER / "_C.so")


def build_report() -> dict[str, Any]:
    """The build's own record (_build.json beside the library); empty where nothing was built."""
    try:
        report = json.loads((library_path().parent / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


_status: Status | None = None
_warned = False


def status() -> Status:
    """Whether the extension is loaded; the first call loads it, and the ops first, whose schemas it must have."""
    global _status
    if _status is None:
        importlib.import_module("oner_fast.ops")
    if _status is None:
        _status = _load()
    return _status


def _load() -> Status:
    report = build_report()
    library = library_path()
    if not library.exists():
        built = report.get("extension", {})
        reason = built.get("reason") or "the package was never built (it is used from its source folder)"
        return Status(False, f"the C++ extension is not built: {reason}", remedy(built.get("remedy", "")))
    oldest = report.get("oldest_torch")
    if oldest and torch.__version__ < oldest:
        reason = f"the C++ extension serves torch {oldest} and newer, this is torch {torch.__version__}"
        return Status(False, reason, f"pip install 'torch>={oldest}'")
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        built = f"built with torch {report['torch']}; " if "torch" in report else ""
        why = error.__cause__ or error  # newer torches wrap the linker's words, which name what is missing
        reason = f"the C++ extension could not be loaded ({built}this is torch {torch.__version__}): {why}"
        return Status(False, reason, remedy())
    if other := other_signatures(library):
        return Status(False, f"the C++ extension was built from other sources: {other}", remedy())
    return Status(True)


def other_signatures(library: Path) -> str:
    """Say which raw op of a loaded library takes or returns other types than its schema here; empty where none does.

    The stable ABI checks no types: a call of such an op would end the process.
    """
    try:
        signatures = ctypes.CDLL(str(library)).oner_fast_signatures
    except AttributeError:
        return "it does not say which arguments its ops take"
    signatures.restype = ctypes.c_char_p
    for line in signatures().decode().splitlines():
        name = line.partition("(")[0]
        for schema in torch._C._jit_get_schemas_for_operator(f"oner_fast::{name}"):
            if line != _signature(name, str(schema)):
                return f"its {name} is {line}, needed {_signature(name, str(schema))}"
    return ""


def _signature(name: str, schema: str) -> str:
    """Write a schema as the library does, without names of arguments: "name(Tensor,int)->Tensor"."""
    arguments, _, results = schema.partition("(")[2].partition(") -> ")
    types = [one.split()[0] for one in arguments.split(", ") if one]
    return f"{name}({','.join(types)})->{results.strip('()').replace(' ', '')}".replace("SymInt", "int")


def remedy(first: str = "") -> str:
    """Return the command that builds the extension again, after what must be done first."""
    return f"{first}, then {build_command()}" if first else build_command()


def warn_if_missing() -> None:
    """Warn once in a process that ops run slower than they could, and name the remedy.

    Under torch.compile it warns too, while the call is traced.
    """
    global _warned
    state = status()
    if not state.loaded and not _warned:
        _warned = True
        warnings.warn(
            f"oner_fast runs its implementations in plain PyTorch: {state.reason}. Remedy: {state.remedy}. "
            "'oner-fast doctor' shows more.",
            RuntimeWarning,
            stacklevel=3,
        )


# torch.compile calls it while it traces, and traces nothing of it.
warn_if_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
