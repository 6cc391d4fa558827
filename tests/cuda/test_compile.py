"""Every CUDA kernel compiles for every GPU that it is built for, without spills where training happens. Needs nvcc, no
GPU, no CUDA build of torch."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from oner_fast.benchmarks.gpuless.architectures import GATED, shared_block_limit

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def compiled(compiler: str, source: Path, target: str, folder: Path) -> list[dict[str, Any]]:
    """The report of ptxas for each kernel."""
    command = [
        compiler, "-cubin", f"-arch={target}", "-std=c++17", "-I", ROOT / "csrc", "-Xptxas", "-v",
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
        kernels.append({"kernel": part.split("'")[0], "architecture": target, **number})
    assert kernels, done.stderr[:1000]
    return kernels


def needs_target(compiler: str, target: str) -> None:
    """Skip the test where this nvcc does not know the GPU."""
    known = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if target not in known:
        pytest.skip(f"this nvcc does not know {target}")


def test_every_source_is_tested() -> None:
    assert [path.stem for path in SOURCES] == [
        "gather_patches", "masked_gather", "mixup_info_nce", "short_attention", "short_attention_backward",
        "token_alignment",
    ]  # fmt: skip


@pytest.mark.parametrize("target", GATED)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(
    compiler: str, source: Path, target: str, tmp_path: Path, record_property: Any
) -> None:
    needs_target(compiler, target)
    kernels = compiled(compiler, source, target, tmp_path)
    record_property("kernels", json.dumps(kernels))
    spilled = [each for each in kernels if each["spill_stores"] or each["spill_loads"] or each["stack"]]
    if source.stem == "short_attention_backward" and target in ("sm_86", "sm_89"):
        return  # Triton serves them: a block has no room there for the rows of one long sequence
    assert not spilled
    limit = shared_block_limit(target)
    assert limit is not None
    assert all(0 < each["registers"] <= most_registers(each["kernel"]) and each["shared"] <= limit for each in kernels)


def most_registers(kernel: str) -> int:
    """Return 128, so that two blocks of 256 threads are resident; 255 where ids leave room for one (decision 042).

    Attention's shared memory leaves room for one block of 256 threads, or for two of 128 (decision 061).
    """
    if re.search(r"\d+short_attention(_backward)?I", kernel):
        return 255
    ids = re.search(r"mixup_statistics\w*Lb([01])ELNS1_4SameE([12])E", kernel)
    return 255 if ids and ids.groups() != ("1", "2") else 128


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_for_what_is_newer_than_the_gated_gpus(compiler: str, source: Path, tmp_path: Path) -> None:
    needs_target(compiler, "sm_100")
    assert compiled(compiler, source, "sm_100", tmp_path)


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
