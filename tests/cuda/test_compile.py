"""Every CUDA kernel compiles for every GPU that it is built for, without spills where training happens. Needs nvcc, no
GPU, no CUDA build of torch."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
GATED = ("80", "90")  # no spills, and what a kernel takes is recorded
SHARED_LIMIT = {"80": 163 << 10, "90": 227 << 10}


def compiled(compiler: str, source: Path, architecture: str, folder: Path) -> list[dict[str, Any]]:
    """The report of ptxas for each kernel."""
    command = [
        compiler, "-cubin", f"-arch=sm_{architecture}", "-std=c++17", "-I", ROOT / "csrc", "-Xptxas", "-v",
        "--Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", source, "-o", folder / "kernels.cubin",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    kernels = []
    for part in done.stderr.split("Compiling entry function '")[1:]:
        number = {
            name: int(match[1]) if (match := re.search(pattern, part)) else 0
            for name, pattern in (
                ("registers", r"Used (\d+) registers"), ("stack", r"(\d+) bytes stack frame"),
                ("spill_stores", r"(\d+) bytes spill stores"), ("spill_loads", r"(\d+) bytes spill loads"),
                ("shared", r"(\d+) bytes smem"),
            )
        }  # fmt: skip
        kernels.append({"kernel": part.split("'")[0], "architecture": f"sm_{architecture}", **number})
    assert kernels, done.stderr[:1000]
    return kernels


def test_every_source_is_tested() -> None:
    assert [path.stem for path in SOURCES] == ["gather_patches", "masked_gather", "mixup_info_nce", "token_alignment"]


@pytest.mark.parametrize("architecture", GATED)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(
    compiler: str, source: Path, architecture: str, tmp_path: Path, record_property: Any
) -> None:
    kernels = compiled(compiler, source, architecture, tmp_path)
    record_property("kernels", json.dumps(kernels))
    spilled = [each for each in kernels if each["spill_stores"] or each["spill_loads"] or each["stack"]]
    assert not spilled
    assert all(0 < each["registers"] <= 128 and each["shared"] <= SHARED_LIMIT[architecture] for each in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["86", "89", "100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_for_other_architectures(compiler: str, source: Path, architecture: str, tmp_path: Path) -> None:
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if f"compute_{architecture}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    assert compiled(compiler, source, architecture, tmp_path)


def test_tensor_cores_and_asynchronous_copies_are_used(compiler: str, tmp_path: Path) -> None:
    source = ROOT / "csrc" / "cuda" / "mixup_info_nce.cu"
    command = [
        compiler,
        "-ptx",
        "-arch=compute_80",
        "-std=c++17",
        "-I",
        ROOT / "csrc",
        source,
        "-o",
        tmp_path / "x.ptx",
    ]
    subprocess.run(command, check=True)
    ptx = (tmp_path / "x.ptx").read_text(encoding="utf-8")
    for instruction in (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16",
        "m16n8k16.row.col.f32.bf16",
        "ldmatrix",
        "cp.async",
    ):
        assert instruction in ptx
