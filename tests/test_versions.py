"""The versions that one built library must serve stand in .ci/versions; other files say the same."""

from __future__ import annotations

import os
import re
import subprocess
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


PYTHON = """#!/usr/bin/env bash
# In the place of Python: `-m venv FOLDER` makes an environment of programs that write down how they are called.
mkdir -p "$3/bin"
for name in pip python pytest; do
  printf '#!/usr/bin/env bash\\n. %q/called "$@"\\n' "$(dirname "$0")" >"$3/bin/$name"
  chmod +x "$3/bin/$name"
done
"""
CALLED = """
name="$(basename "$0")"
echo "$name $* [${PIP_CONSTRAINT:+$(tr '\\n' ' ' <"$PIP_CONSTRAINT")}]${TRITON_INTERPRET:+ interpreted}" >>"$CALLS"
case "$name $*" in
  "pip wheel"*) while [[ "$1" != -w ]]; do shift; done; mkdir -p "$2"; touch "$2/oner_fast-1-cp311-linux.whl" ;;
  "pip "*"+cpu") exit 1 ;;  # no CPU build of this version is found
  "pytest "*) [[ "$(<"$PIP_CONSTRAINT")" != *"$FAILING"* ]] ;;
esac
"""


@pytest.mark.parametrize("failing", ["", "2.13.0"])
def test_one_wheel_is_tested_under_each_version(tmp_path: Path, failing: str) -> None:
    for name, content in (("python3", PYTHON), ("called", CALLED)):
        (tmp_path / name).write_text(content, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    calls, work = tmp_path / "calls", tmp_path / "work"
    work.mkdir()
    given = {
        **os.environ, "PYTHON": str(tmp_path / "python3"), "CALLS": str(calls), "PYTEST": "-k some",
        "FAILING": f"torch=={failing}" if failing else "no version", "PIP_CONSTRAINT": "/the/machine's/own",
    }  # fmt: skip
    done = subprocess.run(
        [str(ROOT / ".ci" / "run_versions"), str(work)], cwd=ROOT, env=given, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == bool(failing), done.stdout + done.stderr
    assert (f"failed under torch=={failing}" if failing else "one library serves") in done.stdout
    said = calls.read_text(encoding="utf-8").splitlines()
    (built,) = [line for line in said if line.startswith("pip wheel")]
    assert f"torch=={lines()[0][0]} " in built, "against the oldest torch"
    tested = [line for line in said if line.startswith("pytest")]
    assert [line.endswith("interpreted") for line in tested] == [False, True] * len(lines())
    for (torch, triton), first in zip(lines(), tested[::2], strict=True):
        assert f"torch=={torch} " in first and f"triton=={triton} " in first and "-k some tests/ops" in first
    assert sum("oner_fast-1-cp311-linux.whl[train]" in line for line in said) == len(lines())
    assert not any((work / name).exists() for name in ("build", "venv")), "each environment is removed"
