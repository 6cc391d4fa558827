"""setup.py's decisions about tools, variables and earlier builds, without compiling anything."""

from __future__ import annotations

import fcntl
import json
import runpy
import shutil
import sys
import sysconfig
import threading
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ("CXX", "MAX_JOBS", "ONER_FAST_CUDA", "ONER_FAST_REQUIRED", "ONER_FAST_WERROR", "ONER_FAST_SANITIZE")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The names of setup.py for a clone in `tmp_path`, in an environment that sets nothing."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    with patch.object(setuptools, "setup"), patch.object(sys, "argv", ["setup.py"]):
        names = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    names["find_torch"].__globals__["ROOT"] = tmp_path  # before anything of it can touch this clone
    (tmp_path / "oner_fast").mkdir()
    return names


def command(build: dict[str, Any], failure: Exception | None = None, cuda: bool = False) -> Any:
    """The build command, in place, with a stand-in for the work: a file, or a failure."""
    made = build["CMakeBuild"](setuptools.Distribution())
    made.inplace = True

    def build_all(report: dict[str, Any]) -> None:
        report["cuda"] = {"built": cuda, "reason": "" if cuda else "nvcc was not found"}
        if failure is not None:
            raise failure
        library = build["find_torch"].__globals__["ROOT"] / "build" / "_C.so"
        library.write_text("new")
        made.libraries = [library]
        report["extension"] = report["native"] = {"built": True, "reason": "", "remedy": ""}

    made.build_all = build_all
    return made


def test_an_earlier_build_serves_until_the_new_one_is_there(build: dict[str, Any], tmp_path: Path) -> None:
    package = tmp_path / "oner_fast"
    native = package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    for path in (package / "_C.so", package / "_C_cuda.so", native, package / "_native.cpython-27-other.so"):
        path.write_text("old")
    made = command(build)
    work = made.build_all
    made.build_all = lambda report: (work(report), seen.append((package / "_C.so").read_text()))
    seen: list[str] = []
    made.run()
    assert seen == ["old"] and (package / "_C.so").read_text() == "new"
    left = {path.name for path in package.iterdir()}
    assert left == {"_C.so", "_build.json", "_native.cpython-27-other.so"}, "another Python's packer stays"
    assert json.loads((package / "_build.json").read_text())["extension"]["built"]


def test_a_build_that_fails_leaves_no_library_unless_it_is_required(
    build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "oner_fast" / "_C.so"
    library.write_text("old")
    monkeypatch.setenv("ONER_FAST_REQUIRED", "1")
    with pytest.raises(SystemExit, match="ONER_FAST_REQUIRED=1, and the extension is not built: no compiler"):
        command(build, build["Missing"]("no compiler")).run()
    assert library.read_text() == "old"
    monkeypatch.delenv("ONER_FAST_REQUIRED")
    command(build, build["Missing"]("no compiler")).run()
    assert not library.exists()
    assert json.loads((tmp_path / "oner_fast" / "_build.json").read_text())["extension"]["reason"] == "no compiler"


def test_a_required_build_with_cuda_asked_for_needs_it(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONER_FAST_CUDA", "1")
    command(build).run()  # asked for, and not required
    monkeypatch.setenv("ONER_FAST_REQUIRED", "1")
    with pytest.raises(SystemExit, match="ONER_FAST_CUDA=1, and CUDA C\\+\\+ is not built: nvcc was not found"):
        command(build).run()
    command(build, cuda=True).run()


@pytest.mark.parametrize("name", ["ONER_FAST_CUDA", "ONER_FAST_REQUIRED"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(SystemExit, match=f"{name} must be 0 or 1, got 'yes'"):
        command(build).run()


@pytest.mark.parametrize("jobs", ["many", "0", "-1"])
def test_a_number_of_jobs_that_is_none_is_named(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, jobs: str
) -> None:
    monkeypatch.setenv("MAX_JOBS", jobs)
    with pytest.raises(build["Missing"], match=f"MAX_JOBS must be a number of at least 1, got '{jobs}'"):
        command(build).compile("cmake", {"ONER_FAST_SANITIZE": ""}, [])


def test_two_builds_of_one_folder_take_turns(build: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    started = threading.Event()
    made = command(build)
    work = made.build_all
    made.build_all = lambda report: (started.set(), work(report))
    with (tmp_path / "build" / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=made.run)
        thread.start()
        assert not started.wait(0.2)
    thread.join(10)
    assert started.is_set() and (tmp_path / "oner_fast" / "_C.so").exists()


def test_a_compiler_may_have_a_launcher_and_arguments(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if (compiler := shutil.which("c++")) is None:
        pytest.skip("this machine has no C++ compiler")
    monkeypatch.setenv("CXX", f"env {compiler} -O1")
    launcher, words, said = build["find_compiler"]()
    assert launcher == [shutil.which("env")] and words == [compiler, "-O1"] and said
    monkeypatch.setenv("CXX", " ")
    assert build["find_compiler"]() == ([], [compiler], said)


def test_a_torch_without_the_stable_abi_is_not_compiled_against(
    build: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    known = build["find_torch"].__globals__
    monkeypatch.setitem(known, "torch_folder", lambda: tmp_path)
    with pytest.raises(build["Missing"], match="is older than torch>=2.10"):
        build["find_torch"]()
    backend = known["is_too_old"].__globals__
    monkeypatch.setitem(backend, "torch_folder", lambda: tmp_path)
    assert backend["_torch"]() == ["torch>=2.10"], "an isolated build gets one"
    (tmp_path / "version.py").write_text('__version__ = "2.10.0"\n')
    assert backend["_torch"]() == [] and build["find_torch"]()["version"] == "2.10.0"
