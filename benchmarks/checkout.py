"""Build another commit of this repository in a folder of its own, with this commit's `benchmarks/` laid over it.

Older commits have no such benchmarks, and both builds should be measured by the same ones. The environment is this one:
the same Python, torch and libraries, with the other checkout in front.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from oner_fast.benchmarks.source import git, refusal

# What a build depends on in a commit; builds of equal sources are shared.
SOURCES = ("csrc", "CMakeLists.txt", "setup.py")
BUILT = ("_C*.so", "_native*", "_build.json")


class NoBuild(Exception):
    """A commit cannot be built here; the message says why."""


@dataclass(frozen=True)
class Checkout:
    """A commit that was built.

    Args:
        commit: its SHA.
        package: the folder for the path, which holds `oner_fast` and nothing else.
    """

    commit: str
    package: Path


def repository() -> Path:
    """Find the repository of this package. Raises NoBuild where it was installed without one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "setup.py").exists() or not (root / ".git").exists():
        raise NoBuild(f"{root} is no git repository: run this from an editable install of a clone")
    return root


def commit_of(root: Path, name: str) -> str:
    """Find the SHA of a commit by its name. Raises NoBuild where it is not in reach."""
    done = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if done.returncode:
        if reason := refusal(_git(root, "rev-parse", "--git-dir")):
            raise NoBuild(reason)
        shallow = _git(root, "rev-parse", "--is-shallow-repository").stdout.strip() == "true"
        remedy = "; the clone is shallow, and `git fetch --unshallow` brings the rest" if shallow else ""
        raise NoBuild(f"{name!r} is no commit in {root}{remedy}")
    return done.stdout.strip()


def check_out(name: str, folder: Path) -> Checkout:
    """Build a commit in a new folder under `folder`.

    A build of the same C++ sources for the same torch, which `folder` keeps, is used again.

    Args:
        name: a commit by any name that git knows.
        folder: where checkouts and builds are kept.

    Raises:
        NoBuild: there is no such commit, it has no package, or the build failed; the message says which.
    """
    root = repository()
    commit = commit_of(root, name)
    place = folder.resolve() / commit[:12]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    _unpack(root, commit, place)
    package = place / "oner_fast"
    if not (package / "__init__.py").exists() or not (place / "setup.py").exists():
        raise NoBuild(f"commit {commit[:12]} has no package oner_fast with a setup.py")
    _lay_over(root, place)
    kept = folder.resolve() / "libraries" / _digest(root, commit)
    if kept.exists():
        for path in kept.iterdir():
            shutil.copy2(path, package / path.name)
    else:
        _build(place, commit)
        _keep(package, kept)
    (place / "path").mkdir()
    (place / "path" / "oner_fast").symlink_to(Path("..") / "oner_fast", target_is_directory=True)
    return Checkout(commit, place / "path")


def _unpack(root: Path, commit: str, place: Path) -> None:
    with tempfile.TemporaryFile() as packed:
        done = subprocess.run(
            ["git", "-C", str(root), "archive", "--format=tar", commit],
            stdout=packed,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode:
            raise NoBuild(f"git archive {commit[:12]} failed: {done.stderr.decode(errors='replace').strip()}")
        packed.seek(0)
        try:
            with tarfile.open(fileobj=packed) as tar:
                tar.extractall(place, filter="data")
        except tarfile.TarError as error:
            raise NoBuild(f"commit {commit[:12]} cannot be unpacked: {error}") from error


def _lay_over(root: Path, place: Path) -> None:
    """Put this working tree's benchmarks in the place of the commit's own."""
    link = place / "oner_fast" / "benchmarks"
    if link.is_symlink():
        link.unlink()
    else:
        shutil.rmtree(link, ignore_errors=True)
    shutil.rmtree(place / "benchmarks", ignore_errors=True)
    shutil.copytree(root / "benchmarks", place / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    link.symlink_to(Path("..") / "benchmarks", target_is_directory=True)


def _build(place: Path, commit: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONER_FAST_")}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stdout.strip().splitlines() or ["no message"])[-1]
        raise NoBuild(f"setup.py of commit {commit[:12]} failed: {last}")
    if reason := _reason(place / "oner_fast"):
        raise NoBuild(f"the C++ extension of commit {commit[:12]} was not built: {reason}")


def _keep(package: Path, kept: Path) -> None:
    """Keep what was built, whole or not at all."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as made:
        partial = Path(made) / kept.name
        partial.mkdir()
        for pattern in BUILT:
            for path in package.glob(pattern):
                shutil.copy2(path, partial / path.name)
        partial.replace(kept)


def _digest(root: Path, commit: str) -> str:
    """Return a digest of all that a build depends on."""
    parts = [torch.__version__, sys.version, os.environ.get("CXX", ""), os.environ.get("TORCH_CUDA_ARCH_LIST", "")]
    parts += [_git(root, "rev-parse", "--verify", "--quiet", f"{commit}:{name}").stdout for name in SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _reason(package: Path) -> str:
    """Say why a package has no C++ extension; empty where it has one."""
    try:
        report = json.loads((package / "_build.json").read_text(encoding="utf-8"))
        return "" if report["extension"]["built"] else str(report["extension"]["reason"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its build left no report ({type(error).__name__})"


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return git(root, *arguments)
    except OSError as error:
        raise NoBuild(f"git is needed to find the other commit, and cannot be run: {error}") from error
