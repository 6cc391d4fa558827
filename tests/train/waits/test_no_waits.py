"""A training step never waits for its GPU: one copy of the batch, nothing read, and a bounded number of operations.

`steps.py` runs the trainings' own steps on tensors without memory on a GPU that is not there. It runs once, in a
process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "operations.json").read_text())
OPERATIONS: dict[str, int] = RECORDED["operations"]
"""Upper bounds of a step's operations on the GPU, by case; views are left out, and each of the others is a launch."""
SLACK = 0.8
"""A step of fewer than this share of its bound needs a new bound, or it could grow again unseen."""

BEFORE = "cpu -> cuda, does not wait"
AFTER = "cuda -> cpu, does not wait, 4 float64"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the steps, by case."""
    if torch.version.cuda is not None:
        pytest.skip("the stand-in of a GPU is for PyTorch's CPU build, which has none of CUDA's own")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler for the stand-in of a GPU")
    folder, root = tmp_path_factory.mktemp("waits"), Path(torch.__file__).parent
    library, report = folder / "fake_gpu.so", folder / "report.json"
    build = [
        compiler,
        "-std=c++20",
        "-O0",
        "-w",
        "-shared",
        "-fPIC",
        f"-I{root / 'include'}",
        str(HERE / "fake_gpu.cpp"),
    ]
    build += ["-o", str(library), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    subprocess.run(build, check=True, capture_output=True, text=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(HERE / "steps.py"), str(report)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    steps: dict[str, Any] = json.loads(report.read_text())
    return steps


@pytest.mark.parametrize("case", OPERATIONS)
def test_one_copy_takes_the_batch_there_and_one_brings_the_guards_numbers_back(
    found: dict[str, Any], case: str
) -> None:
    first, last = found[case]["copies"]
    assert first.startswith(BEFORE) and first.endswith("uint8") and last == AFTER


@pytest.mark.parametrize("case", OPERATIONS)
def test_the_host_reads_the_guards_numbers_a_step_later(found: dict[str, Any], case: str) -> None:
    started, *read = found[case]["read"]
    assert read == list(range(1, started)) and not found[case]["waited"]


@pytest.mark.parametrize("case", OPERATIONS)
def test_the_operations_of_a_step_do_not_grow(found: dict[str, Any], case: str) -> None:
    if not torch.__version__.startswith(RECORDED["torch"]) or importlib.util.find_spec("triton") is None:
        pytest.skip(f"the bounds are those of torch {RECORDED['torch']} with Triton")
    count, bound = found[case]["operations"], OPERATIONS[case]
    assert SLACK * bound <= count <= bound, f"{case}: {count} operations, the bound in operations.json is {bound}"


@pytest.mark.parametrize("case", OPERATIONS)
def test_attention_knows_its_longest_sequence(found: dict[str, Any], case: str) -> None:
    """flash-attn and torch's varlen_attn serve only then."""
    assert found[case]["longest"] and None not in found[case]["longest"]


@pytest.mark.parametrize("case", ["a number that the step reads", "masks that the step draws"])
def test_a_step_that_waits_is_found(found: dict[str, Any], case: str) -> None:
    spoilt = found[case]
    assert "DataDependentOutputException" in spoilt.get("error", "") or len(spoilt["copies"]) > 2


def test_every_case_is_bounded(found: dict[str, Any]) -> None:
    assert {case for case in found if "error" not in found[case]} >= set(OPERATIONS)
