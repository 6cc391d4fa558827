"""Build wheels with setuptools, and ask for torch where the extension would find none to be compiled against.

`oner_fast/_C.so` keeps to PyTorch's stable ABI, so the torch that it is compiled against needs not be the torch that it
will run with. A build in isolation takes the headers of the torch that is installed beside the Python that runs it,
although it cannot import that torch. Only where there is none, or one without the stable ABI, one is downloaded for
the build.
"""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]
TORCH = "torch>=2.10"


def torch_folder() -> Path | None:
    """Find the installed torch without importing it: on the path, or else where this Python's packages are."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    found = [Path(place) for place in (spec.submodule_search_locations or [] if spec else [])]
    found += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return next((folder for folder in found if (folder / "include").is_dir() and (folder / "lib").is_dir()), None)


def is_too_old(folder: Path) -> bool:
    """Whether the torch in `folder` is older than the ops can be compiled against."""
    found = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)", (folder / "version.py").read_text(encoding="utf-8"))
    oldest = tuple(int(part) for part in TORCH.partition(">=")[2].split("."))
    return found is not None and (int(found[1]), int(found[2])) < oldest


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """List what a wheel's build needs beyond pyproject.toml: torch, where none that serves is installed."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """List what an editable install's build needs beyond pyproject.toml: torch, where none that serves is installed."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]


def _torch() -> list[str]:
    folder = torch_folder()
    return [TORCH] if folder is None or is_too_old(folder) else []
