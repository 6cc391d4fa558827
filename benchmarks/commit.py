"""The commit of the sources that are measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

_SOURCES = Path(__file__).resolve().parent


def commit() -> str:
    """Return the commit's SHA, with "+" where a tracked file differs from it; empty outside a repository."""
    try:
        sha = _git("rev-parse", "HEAD")
        return sha + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*words: str) -> str:
    command = ["git", "-C", str(_SOURCES), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
