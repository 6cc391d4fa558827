"""The versions that one built library must serve stand in .ci/versions; other files say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from oner_fast import remedies

ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"torch==([\d.]+) triton==([\d.]+) numpy(?:<|>=)[\d.]+")


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def lines() -> list[tuple[str, str]]:
    """Return torch and Triton of each line, in the order of the file."""
    found = []
    for line in text(".ci/versions").splitlines():
        if not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match, f"{line!r} is not 'torch==X triton==Y numpy<Z'"
            found.append((match[1], match[2]))
    return found


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_first_line_is_the_oldest_torch_that_the_package_promises() -> None:
    versions = [number(torch) for torch, _ in lines()]
    assert versions == sorted(versions) and len(set(versions)) == len(versions) >= 3
    (needed,) = [
        line for line in tomllib.loads(text("pyproject.toml"))["project"]["dependencies"] if line.startswith("torch")
    ]
    assert needed == f"torch>={versions[0][0]}.{versions[0][1]}"


def test_each_torch_has_the_triton_that_its_builds_bring() -> None:
    assert [triton for _, triton in lines()] == [remedies.TRITON[number(torch)[1]] for torch, _ in lines()]


def test_the_torch_of_make_install_is_among_them() -> None:
    found = re.search(r"^TORCH_CPU \?= torch==([\d.]+)", text("Makefile"), re.MULTILINE)
    assert found and found[1] in [torch for torch, _ in lines()]


@pytest.mark.parametrize("page", ["docs/installation.md", "docs/support.md"])
def test_pages_name_every_version(page: str) -> None:
    assert all(torch in text(page) and triton in text(page) for torch, triton in lines())
