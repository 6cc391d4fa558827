"""open_clip and timm import with any build of torchvision, and a clear error names a missing one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from oner_fast.models.optional_packages import optional_package


@pytest.mark.parametrize("name", ["open_clip", "timm"])
def test_optional_packages_import(name: str) -> None:
    assert optional_package(name).__name__ == name and optional_package(name) is sys.modules[name]


def test_a_missing_package_is_named() -> None:
    program = (
        "import sys; sys.modules['open_clip'] = None\n"
        "from oner_fast.models.optional_packages import optional_package\n"
        "try: optional_package('open_clip')\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert "pip install open_clip_torch torch==" in done.stdout
