"""No extra moves torch, torchvision or Triton: not by what it requires, and not when pip resolves it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from oner_fast import remedies

ROOT = Path(__file__).resolve().parents[1]
HELD = {"torch", "torchvision", "triton"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
LINES = [line for line in (ROOT / ".ci" / "versions").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
# Every torch that is asked about, and the packages that it requires and finds installed.
BESIDE: dict[str, list[str]] = {
    torch.removeprefix("torch=="): [triton] for torch, triton, _ in (line.split() for line in LINES)
} | {"2.13.0+cpu": []}


def _name(line: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", line)
    assert found, line
    return re.sub("[-_.]+", "-", found[0]).lower()


def _extras_of(line: str) -> list[str]:
    found = re.match(r"[A-Za-z0-9._-]+\s*\[([^]]*)\]", line)
    return [each.strip() for each in found[1].split(",")] if found else []


def _closure(lines: list[str]) -> dict[str, str]:
    """Return what `lines` require, to any depth as far as it is installed here: package -> the chain to it."""
    found: dict[str, str] = {}
    waiting = [(line, "") for line in lines]
    while waiting:
        line, above = waiting.pop()
        name, chain = _name(line), f"{above} > {line.partition(';')[0].strip()}"
        if name == "oner-fast":
            waiting += [(each, chain) for extra in _extras_of(line) for each in EXTRAS[extra]]
            continue
        if name in found:
            continue
        found[name] = chain
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        asked = _extras_of(line)
        for each in required:
            extra = re.search(r"extra\s*==\s*[\"']([^\"']+)", each)
            if extra is None or extra[1] in asked:
                waiting.append((each, chain))
    return found


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_no_extra_requires_what_belongs_to_one_torch(extra: str) -> None:
    found = _closure(EXTRAS[extra])
    assert not (wrong := {found[name] for name in HELD & found.keys()}), wrong


def test_a_package_that_pins_torch_is_found_at_any_depth() -> None:
    if "torchvision" not in (found := _closure(["oner_fast[train]", "open-clip-torch>=3.0"])):
        pytest.skip("open_clip is not installed")
    assert "open-clip-torch" in found["torchvision"] or "timm" in found["torchvision"]


def test_companions_are_no_extras() -> None:
    assert not EXTRAS.keys() & remedies.COMPANIONS.keys()


# --- pip itself, which asks the package index -----------------------------------------------------------------------


def _record(site: Path, name: str, version: str, requires: list[str]) -> None:
    """Record a package as installed, so that pip resolves beside it; nothing else of it is there."""
    folder = site / f"{name}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires), ""]))
    (folder / "RECORD").write_text("")
    (folder / "INSTALLER").write_text("pip\n")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this package that holds its metadata alone, which is all that a dry run reads."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    (source / "oner_fast").mkdir(parents=True)
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "README.md", "LICENSE", "oner_fast/__init__.py"):
        shutil.copy(ROOT / name, source / name)
    program = "import setuptools.build_meta as build, sys; print(build.prepare_metadata_for_build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    info = folder / done.stdout.splitlines()[-1]
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "RECORD").write_text("")
    wheel = folder / f"{info.name.removesuffix('.dist-info')}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted(info.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return wheel


@pytest.fixture(scope="module", params=BESIDE)
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which pip finds torch, and the Triton that its build brings."""
    folder = tmp_path_factory.mktemp("beside")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    _record(site, "torch", request.param, BESIDE[request.param])
    for line in BESIDE[request.param]:
        _record(site, *line.split("=="), [])
    return folder / "bin" / "python"


def _resolved(python: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Return the metadata of every package that pip would install, by name."""
    report = python.parent / "report.json"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--dry-run", "--quiet", "--report"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*pip, str(report), *arguments], env=environment, capture_output=True, text=True, cwd="/", check=False
    )
    if (
        "Could not find a version that satisfies the requirement" in done.stderr
        and "from versions: none" in done.stderr
    ):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    installed = json.loads(report.read_text(encoding="utf-8"))["install"]
    return {_name(each["metadata"]["name"]): each["metadata"] for each in installed}


@pytest.mark.slow
@pytest.mark.install
@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_pip_moves_nothing_for_an_extra(extra: str, package: Path, beside: Path) -> None:
    found = _resolved(beside, f"oner_fast[{extra}] @ file://{package}")
    assert "oner-fast" in found and not HELD & found.keys(), found.keys()


@pytest.mark.slow
@pytest.mark.install
def test_pip_finds_the_torchvision_of_this_torch(beside: Path) -> None:
    (torch,) = beside.parents[1].glob("lib/python3*/site-packages/torch-*.dist-info")
    held = "torch==" + torch.name.removesuffix(".dist-info").removeprefix("torch-").partition("+")[0]
    found = _resolved(beside, *remedies.COMPANIONS["clip"][1:], held)
    assert {"open-clip-torch", "timm", "torchvision"} <= found.keys()
    assert not {"torch", "triton"} & found.keys(), found.keys()
