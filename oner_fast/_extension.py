"""Load the C++ extension once; where it is missing, say why and how to get it.

The extension uses PyTorch's stable ABI alone. One build serves the oldest torch that it was built for, and all newer
ones.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import re
import struct
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oner_fast import bounded_json
from oner_fast.remedies import build_command

_FOLDER = Path(__file__).parent
_OF_PYTORCH = {"mixup_partner_sums"}  # the extension computes these raw ops with PyTorch's own
_OF_GPUS = {"short_attention_table", "short_attention", "short_attention_backward"}  # in CUDA C++ alone
_PARTS = ("extension", "native", "cuda")  # the entries of _build.json that are objects


@dataclass(frozen=True)
class Status:
    """Whether the compiled ops are loaded; if not, the reason and the remedy."""

    loaded: bool
    reason: str = ""
    remedy: str = ""


def library_path() -> Path:
    """Absolute path of the extension: in the package, or the path in ONER_FAST_LIBRARY, which names another build."""
    return Path(os.path.abspath(os.environ.get("ONER_FAST_LIBRARY") or _FOLDER / "_C.so"))


def build_report() -> dict[str, Any]:
    """The build's own record (_build.json beside the library); empty where nothing was built.

    An entry of another type than a build writes is left out.
    """
    try:
        found = bounded_json.load_object((library_path().parent / "_build.json").read_bytes(), "_build.json")
    except (OSError, ValueError):
        return {}
    report: dict[str, Any] = {}
    for name, value in found.items():
        if name in _PARTS and isinstance(value, dict):
            report[name] = {inner: one for inner, one in value.items() if isinstance(one, (str, bool))}
        elif name not in _PARTS and isinstance(value, str):
            report[name] = value
    if not re.fullmatch(r"\d+(\.\d+)*", report.get("oldest_torch", "")):
        report.pop("oldest_torch", None)
    return report


_status: Status | None = None
_warned = False
LOCK = threading.Lock()  # of the flags that say whether a warning was given


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
    if not os.path.isfile(library):
        if _is_asked_for():
            return Status(False, "the C++ extension is not there: ONER_FAST_LIBRARY names no file", remedy())
        built = report.get("extension", {})
        reason = built.get("reason") or "the package was never built (it is used from its source folder)"
        return Status(False, f"the C++ extension is not built: {reason}", remedy(built.get("remedy", "")))
    oldest = report.get("oldest_torch")
    if oldest and torch.__version__ < oldest:
        reason = f"the C++ extension serves torch {oldest} and newer, this is torch {torch.__version__}"
        return Status(False, reason, f"pip install 'torch>={oldest}'")
    if why := why_unfit(library):
        return Status(False, f"the C++ extension {why}", remedy())
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        built_with = f"built with torch {report['torch']}; " if "torch" in report else ""
        why = str(error.__cause__ or error)  # newer torches wrap the linker's words, which name what is missing
        reason = f"the C++ extension could not be loaded ({built_with}this is torch {torch.__version__}): {why}"
        return Status(False, reason, remedy())
    if other := other_signatures(library) or _missing_ops(library):
        return Status(False, f"the C++ extension was built from other sources: {other}", remedy())
    return Status(True)


def why_unfit(library: Path) -> str:
    """Say why a library must not be loaded, as the end of a sentence about it; empty where nothing speaks against it.

    The linker ends the process where it reads past the end of a file. A library from before the stable ABI ends it too
    where it registers an op of other types.
    """
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64:
                return ""  # the linker refuses it, or another system's linker takes it
            if (needed := _bytes_of_elf(data)) > len(data):
                return f"is cut off: {library} has {len(data):,} bytes, and its tables say {needed:,}"
            if data.find(b"oner_fast_signatures") < 0:
                return "was built from other sources: it does not say which arguments its ops take"
    except (OSError, ValueError, struct.error):  # the linker says what is wrong with it
        pass
    return ""


def _bytes_of_elf(data: mmap.mmap) -> int:
    """Return how many bytes a file in the format ELF (64 bits, little endian) has at least by its own tables."""
    segments, sections = struct.unpack_from("<QQ", data, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<HHHH", data, 54)
    needed = [segments + segment_size * segment_count, sections + section_size * section_count]
    for place in range(segments, min(needed[0], len(data) - 39), max(segment_size, 1)):
        offset, _, _, size = struct.unpack_from("<QQQQ", data, place + 8)
        needed.append(offset + size)
    return int(max(needed))


def other_signatures(library: Path) -> str:
    """Say which raw op of a loaded library takes or returns other types than its schema here; empty where none does.

    The stable ABI checks no types: a call of such an op would end the process.
    """
    lines = _signatures(library)
    if lines is None:
        return "it does not say which arguments its ops take"
    for line in lines:
        name = line.partition("(")[0]
        for schema in torch._C._jit_get_schemas_for_operator(f"oner_fast::{name}"):
            if line != _signature(name, str(schema)):
                return f"its {name} is {line}, needed {_signature(name, str(schema))}"
    return ""


def _missing_ops(library: Path) -> str:
    """Say which raw op a loaded library lacks; empty where it has all."""
    said = {line.partition("(")[0] for line in _signatures(library) or []}
    defined = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    needed = {name.removeprefix("oner_fast::") for name in defined if name.startswith("oner_fast::")}
    missing = sorted(needed - said - _OF_PYTORCH - _OF_GPUS)
    return f"it has no {', '.join(missing)}" if missing else ""


def _signatures(library: Path) -> list[str] | None:
    """Return what a loaded library says of its ops, a line for each; None where it does not say."""
    try:
        signatures = ctypes.CDLL(str(library)).oner_fast_signatures
    except AttributeError:
        return None
    signatures.restype = ctypes.c_char_p
    return list(signatures().decode().splitlines())


def _signature(name: str, schema: str) -> str:
    """Write a schema as the library does, without names of arguments: "name(Tensor,int)->Tensor"."""
    arguments, _, results = schema.partition("(")[2].partition(") -> ")
    types = [one.split()[0] for one in arguments.split(", ") if one]
    return f"{name}({','.join(types)})->{results.strip('()').replace(' ', '')}".replace("SymInt", "int")


def remedy(first: str = "") -> str:
    """Return what makes the extension serve: its build, after what must be done first, or no other library."""
    if _is_asked_for():
        return f"unset ONER_FAST_LIBRARY (it is {library_path()}), or name a library of these sources"
    return f"{first}, then {build_command()}" if first else build_command()


def _is_asked_for() -> bool:
    """Whether ONER_FAST_LIBRARY names the library."""
    return bool(os.environ.get("ONER_FAST_LIBRARY"))


def warn_if_missing() -> None:
    """Warn once in a process that ops run slower than they could, and name the remedy.

    Under torch.compile it warns too, while the call is traced.
    """
    global _warned
    state = status()
    if state.loaded:
        return
    with LOCK:
        if _warned:
            return
        _warned = True
    warnings.warn(
        f"oner_fast runs its implementations in plain PyTorch: {state.reason}. Remedy: {state.remedy}. "
        "'oner-fast doctor' shows more.",
        RuntimeWarning,
        stacklevel=outer_level(),
    )


def outer_level() -> int:
    """Return the `stacklevel` by which a warning of the caller names the first line outside this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "oner_fast":
        frame, level = frame.f_back, level + 1
    return level


# torch.compile calls it while it traces, and traces nothing of it.
warn_if_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
