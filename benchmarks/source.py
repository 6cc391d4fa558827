"""The commit and the versions that are measured."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import oner_fast


def commit_of_this(folder: Path | None = None) -> tuple[str, bool]:
    """Find the commit of the benchmarks that run, and whether tracked files differ from it.

    Args:
        folder: a folder of the repository; that of this file by default.

    Returns:
        The SHA and the difference; ("", False) without git, or where the folder's files are in no commit, as in an
        installed package.
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


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, without spaces around it; None where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()
