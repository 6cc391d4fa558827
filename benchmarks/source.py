"""The commit and the versions that are measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import oner_fast

_OF_HOOKS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")


def commit_of_this(folder: Path | None = None) -> tuple[str, bool]:
    """Find the commit of the benchmarks that run, and whether tracked files differ from it.

    Args:
        folder: a folder of the repository; that of this file by default.

    Returns:
        The SHA and the difference; ("", False) without git, or where the folder's files are in no commit, as in an
        installed package. Where git refuses a folder of another owner, a line on standard error says so.
    """
    folder = Path(__file__).resolve().parent if folder is None else folder
    if _git(folder, "ls-files", "--error-unmatch", ".") is None:
        return "", False
    commit = _git(folder, "rev-parse", "HEAD")
    return (commit, bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))) if commit else ("", False)


def versions() -> dict[str, str]:
    """Return the versions of torch, triton, python and oner_fast; empty for what is not installed."""
    return {
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "oner_fast": oner_fast.__version__,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a folder, with its messages in English, and without what a hook sets for another repository.

    Raises:
        OSError: git is not there.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OF_HOOKS}
    return subprocess.run(
        ["git", "-C", str(folder), *arguments],
        env={**environment, "LC_ALL": "C"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return git's reason and remedy where it refuses a folder of another owner; empty where it does not."""
    return " ".join(done.stderr.split()) if done.returncode and "safe.directory" in done.stderr else ""


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, without spaces around it; None where it fails or is not there."""
    try:
        done = git(folder, *arguments)
    except OSError:
        return None
    if reason := refusal(done):
        print(f"no commit is named: {reason}", file=sys.stderr)
    return None if done.returncode else done.stdout.strip()
