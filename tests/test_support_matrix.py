"""The committed support matrix is what its command writes, and its answers are the registry's."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from oner_fast import ops
from oner_fast.ops import implementations

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "support_matrix.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def toy() -> Iterator[str]:
    """An op that needs a GPU of sm_90 for float16, and CUDA C++ otherwise."""

    def picky(device: str, dtype: torch.dtype | None = None, **facts: Any) -> list[str]:
        return [] if dtype == torch.float16 and torch.cuda.get_device_capability() >= (9, 0) else ["no"]

    implementations.register("toy", "reference", lambda: None)
    implementations.register("toy", "new", lambda: None, devices=("cuda",), preference=20, reasons=picky)
    implementations.register("toy", "cuda", lambda: None, devices=("cuda",), preference=10, compiled=True)
    yield "toy"
    del implementations._registry["toy"]


def test_the_committed_page_is_what_the_command_writes(tmp_path: Path) -> None:
    page = tmp_path / "support.md"
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(page)], check=True, timeout=300)
    assert page.read_text() == (ROOT / "docs" / "support.md").read_text(), "run `make support`"


def test_answers_depend_on_the_described_machine(script: dict[str, Any], toy: str) -> None:
    machine, able = script["Machine"], script["able"]
    old, new = machine("cuda", cuda_cpp=True), machine("cuda", cuda_cpp=True, architecture="90")
    assert able(toy, torch.float16, machine("cpu"), "2.13.0") == ["reference"]
    assert able(toy, torch.float16, old, "2.13.0") == ["cuda", "reference"]
    assert able(toy, torch.float16, new, "2.13.0") == ["new", "cuda", "reference"]
    assert able(toy, torch.float32, new, "2.13.0") == ["cuda", "reference"]
    assert able(toy, torch.float32, machine("cuda", built=False), "2.13.0") == ["reference"]


def test_asking_leaves_the_process_as_it_was(script: dict[str, Any]) -> None:
    before = implementations.explain("cpu"), torch.__version__
    tokens, kept = torch.randn(1, 2, 3), torch.zeros(1, 1, dtype=torch.int64)
    expected = ops.masked_gather(tokens, kept)
    script["able"]("masked_gather", torch.float32, script["Machine"]("cuda", built=False), "2.13.0")
    assert (implementations.explain("cpu"), torch.__version__) == before
    assert torch.equal(ops.masked_gather(tokens, kept), expected)


def test_every_op_and_every_gpu_has_its_row(script: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "support.md").read_text()
    assert all(f"| {op} |" in page for op in implementations.ops())
    assert all(f"| sm_{target} | {script['GPUS'][target]} |" in page for target in script["architectures"]())
