"""CONTRIBUTING.md names files, lists and targets of make; all of them exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
OP_WALK = PAGE.split("## Add an op")[1].split("\n## ")[0]
FILE = re.compile(r"[\w./<>-]+\.(?:py|md|cpp|cu|h|toml|json|yml|txt)|[\w./<>-]+/")


def named(text: str) -> list[str]:
    """Return what the text names in single backticks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def files(text: str) -> list[str]:
    """Return the files and folders that the text names from the root of the project, without placeholders."""
    found = [each for each in named(text) if FILE.fullmatch(each) and "<" not in each and "/" in each]
    return [each for each in found if (ROOT / each.split("/")[0]).exists()]


@pytest.mark.parametrize("path", sorted({each for each in files(PAGE) if "NAME" not in each}))
def test_files_that_the_guide_names_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted({each for each in files(OP_WALK) if "NAME" in each}))
def test_the_example_has_every_file_of_an_op(path: str) -> None:
    assert (ROOT / path.replace("NAME", "token_alignment")).exists()


@pytest.mark.parametrize(
    ("path", "name"),
    sorted(
        {
            *re.findall(r"`([\w/]+\.py)`\s+\(`([\w.]+)`\)", PAGE),
            *((path, name) for name, path in re.findall(r"`([A-Z_]+)` in\s+`([\w/]+\.py)`", PAGE)),
        }
    ),
)
def test_names_that_the_guide_gives_are_in_their_files(path: str, name: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(rf"\b{name.rpartition('.')[2]}\b", text), f"{path} has no {name}"


def test_make_targets_that_the_guide_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    commands = re.findall(r"^\s*(make(?: [a-z-]+)+)", PAGE, flags=re.MULTILINE)
    asked = {word for command in commands for word in command.split()[1:]}
    assert asked and asked <= targets
