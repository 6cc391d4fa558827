"""Load the ops in CUDA C++ once, after those of the CPU; where they cannot serve, say why and how to get them.

They are a library of their own, so that a torch without CUDA loads the ops of the CPU from the same installation. Built
once, it serves every torch of the same major version of CUDA, whose runtime it shares.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from oner_fast import _extension
from oner_fast._extension import Status

_status: Status | None = None
_unusable = False  # they are installed, and cannot serve
_warned = False


def library_path() -> Path:
    """Path of the library, beside the ops of the CPU."""
    return _extension.library_path().with_name("_C_cuda.so")


def status() -> Status:
    """Whether the ops in CUDA C++ are loaded; the first call loads them."""
    global _status, _unusable
    if _status is None:
        _status = _load()
        _unusable = not _status.loaded and _extension.status().loaded and os.path.isfile(library_path())
    return _status


def warn_if_unusable() -> None:
    """Warn once in a process that the installed ops in CUDA C++ cannot serve a GPU, and name the remedy."""
    global _warned
    if not _unusable:
        return
    with _extension.LOCK:
        if _warned:
            return
        _warned = True
    state = status()
    warnings.warn(
        f"oner_fast runs Triton or plain PyTorch on the GPU: {state.reason}. Remedy: {state.remedy}. "
        "'oner-fast doctor' shows more.",
        RuntimeWarning,
        stacklevel=_extension.outer_level(),
    )


# As in `_extension`: torch.compile calls it while it traces, and traces nothing of it.
warn_if_unusable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _remedy() -> str:
    """Return what builds the ops in CUDA C++ for the torch that is installed."""
    if torch.version.cuda is None:
        return f"install a torch with CUDA, then {_extension.remedy()}"
    return _extension.remedy(f"put nvcc of CUDA {torch.version.cuda.split('.')[0]} on PATH or set CUDA_HOME to it")


def _load() -> Status:
    extension = _extension.status()
    if not extension.loaded:
        return extension
    built = _extension.build_report().get("cuda", {})
    library = library_path()
    if not os.path.isfile(library):
        reason = built.get("reason") or "it is compiled from source alone, beside a torch with CUDA"
        return Status(False, f"the extension was built without CUDA C++: {reason}", _remedy())
    built_for, this = str(built.get("version") or "an unknown version"), torch.version.cuda
    if this is None:
        return Status(
            False,
            f"the ops in CUDA C++ were built for CUDA {built_for}, and torch {torch.__version__} has no CUDA",
            "install a torch with CUDA to use a GPU; the ops of the CPU need none",
        )
    if built.get("version") and built_for.split(".")[0] != this.split(".")[0]:
        return Status(
            False,
            f"the ops in CUDA C++ were built for CUDA {built_for}, and torch {torch.__version__} has CUDA {this}",
            _remedy(),
        )
    if why := _extension.why_unfit(library):
        return Status(False, f"the library of the ops in CUDA C++ {why}", _remedy())
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return Status(False, f"the ops in CUDA C++ could not be loaded: {error.__cause__ or error}", _remedy())
    if other := _extension.other_signatures(library):
        return Status(False, f"the ops in CUDA C++ were built from other sources: {other}", _remedy())
    return Status(True)
