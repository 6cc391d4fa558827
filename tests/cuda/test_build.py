"""setup.py's decisions about the CUDA part, without building it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools

TORCH = {"version": "2", "include": [], "library": "lib", "cuda": "13.0"}


@pytest.fixture
def build(setup_names: Callable[[], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The names of setup.py, in an environment that sets nothing."""
    for variable in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "ONER_FAST_SANITIZE", "ONER_FAST_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    return setup_names()


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch) -> str:
    """An nvcc that says what it is asked for, and no more."""
    said = {
        "--version": "Cuda compilation tools, release 12.6, V12.6.20\n",
        "--list-gpu-arch": "compute_80\ncompute_90\n",
    }

    def run(command: list[str], **how: Any) -> Any:
        return subprocess.CompletedProcess(command, 0, stdout=said[command[-1]])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("shutil.which", lambda name, path=None: "/cuda/bin/nvcc")
    return "/cuda/bin/nvcc"


def test_the_architectures_compiled_for(build: Any, nvcc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build["cuda_architectures"](nvcc) == "80-real;90"  # of ours, what this nvcc knows
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 8.6;9.0+PTX")
    assert build["cuda_architectures"](nvcc) == "80-real;86-real;90"


def test_reasons_why_no_cuda_part_is_built(build: Any, nvcc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = build["find_cuda"]
    assert find({**TORCH, "cuda": "12.8"}) == (nvcc, "")
    assert find({**TORCH, "cuda": None}) == (None, "the torch that it was built with has no CUDA")
    assert "nvcc is CUDA 12.6 but torch has CUDA 13.0" in find(TORCH)[1]
    monkeypatch.setattr("shutil.which", lambda name, path=None: None)
    assert "nvcc was not found (torch has CUDA 13.0)" in find(TORCH)[1]
    monkeypatch.setenv("ONER_FAST_SANITIZE", "address")
    assert find(TORCH) == (None, "sanitizers watch the CPU's code")
    monkeypatch.setenv("ONER_FAST_CUDA", "0")
    assert find(TORCH) == (None, "ONER_FAST_CUDA=0 left it out, as wheels do")


def command_of(build: Any, folder: Path, compile_: Any) -> Any:
    """The build command, with stand-ins for what it finds and for the compilers."""
    command = build["CMakeBuild"](setuptools.Distribution())
    command.package, command.compile = folder, compile_
    known = command.build_all.__globals__
    known.update(find_torch=lambda: TORCH, find_cuda=lambda torch: ("nvcc", ""), cuda_architectures=lambda nvcc: "80")
    known.update(find_tool=lambda name: name, find_pybind11=lambda: [], cuda_release=lambda nvcc: "13.0")
    return command


def test_the_ops_for_gpus_are_a_library_of_their_own(build: Any, tmp_path: Path) -> None:
    output, package = tmp_path / "out", tmp_path / "package"
    output.mkdir(), package.mkdir()
    (output / "_C.so").write_text("for the CPU")
    (output / "_C_cuda.so").write_text("for GPUs")
    report: dict[str, Any] = {}
    command = command_of(build, package, lambda cmake, settings, facts: output)
    command.build_all(report)
    assert command.libraries == [output / "_C.so", output / "_C_cuda.so"]
    assert report["cuda"] == {"built": True, "reason": "", "architectures": "80", "version": "13.0"}


def test_the_cpu_part_is_built_where_cuda_cannot_be(build: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_C.so").write_text("the library")
    asked = []

    def compile_(cmake: str, settings: dict[str, str], facts: list[str]) -> Path:
        asked.append(settings["ONER_FAST_CUDA"])
        if asked[-1] == "ON":
            raise build["Missing"]("compiling failed: nvcc is not well", "see a doctor")
        return tmp_path / "out"

    report: dict[str, Any] = {}
    command = command_of(build, tmp_path, compile_)
    command.build_all(report)
    assert asked == ["ON", "OFF"] and command.libraries == [tmp_path / "out" / "_C.so"]
    assert report["cuda"] == {"built": False, "reason": "compiling failed: nvcc is not well"}
    assert report["extension"]["built"]
