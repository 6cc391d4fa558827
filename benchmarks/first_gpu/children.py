"""Run a command in a process group of its own, with a time limit and its output in a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 3.0
"""Seconds between the request to stop and the end by force."""


@dataclass(frozen=True)
class Ended:
    """End of a process: its exit status, whether the time limit ended it, and the last line that it wrote."""

    status: int
    timed_out: bool
    last: str


def run(command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run `command` and wait for it.

    At the time limit, and when this process is interrupted, the command's whole process group is ended.

    Args:
        command: the program and its arguments.
        log: file for its standard output and standard error; replaced.
        seconds: the time limit.
        environment: variables that it gets beside those of this process.
    """
    variables = {**os.environ, **(environment or {})}
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables, start_new_session=True
        )
        timed_out = False
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _end(child)
    return Ended(child.returncode, timed_out, _last_line(log))


def module(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of this package with this Python."""
    return [sys.executable, "-m", name, *arguments]


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the process group, what the child itself started included."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, sent)
        except (ProcessLookupError, PermissionError):
            pass
        try:
            child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            continue
        if sent == signal.SIGTERM and not _group_lives(child.pid):
            return


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
