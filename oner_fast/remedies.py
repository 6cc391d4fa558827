"""The pip command for a missing package: it names what is missing, and it holds torch at its version."""

from __future__ import annotations

import re
import shlex
from importlib import metadata

PACKAGE = "oner_fast"
_REQUIREMENT = re.compile(r"""\s*([A-Za-z0-9._-]+)\s*(?:\[([^]]*)\])?([^;]*)(?:;(.*))?""")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def install_command(*packages: str) -> str:
    """Return the command that installs `packages` (pip's requirements) beside the torch that is installed.

    pip would else be free to replace torch by a later version, for which the extension is not built.
    """
    held = [f"torch=={version.partition('+')[0]}"] if (version := _version("torch")) else []
    return shlex.join(["pip", "install", *packages, *held])


def install_extra_command(extra: str) -> str:
    """Return the command that installs what is missing of an extra of this package."""
    missing = [] if _version(PACKAGE) is None else _missing(extra, set())
    return install_command(*(missing or [f"{PACKAGE}[{extra}]"]))


def _missing(extra: str, seen: set[str]) -> list[str]:
    """List the requirements of an extra, and of those that it includes, that are not installed."""
    seen.add(extra)
    found: list[str] = []
    for line in metadata.requires(PACKAGE) or []:
        match = _REQUIREMENT.match(line)
        asked = _EXTRA.search(match.group(4) or "") if match else None
        if match is None or asked is None or asked.group(1) != extra:
            continue
        name, extras, bounds = match.group(1), match.group(2), match.group(3)
        if name.replace("-", "_").lower() == PACKAGE:
            for other in (part.strip() for part in (extras or "").split(",")):
                found += _missing(other, seen) if other not in seen else []
        elif _version(name) is None:
            found.append(name + bounds.strip())
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
