"""Compilation for GPUs that are not here, and the estimate that is made of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

from oner_fast.benchmarks.gpuless import aot, estimate, tools

REQUESTS = """
from oner_fast.benchmarks.gpuless.aot import Request
from sample_kernels import matmul

TYPES = dict(A="*fp16", B="*fp16", C="*fp16", M="i32", N="i32", K="i32", stride_am="i32", stride_bk="i32",
             stride_cm="i32")
DIVISIBLE = dict.fromkeys(("N", "K", "stride_am", "stride_bk", "stride_cm"), 16)


def small():
    options = dict(num_warps=4, num_stages=3)
    return [Request(matmul, TYPES, dict(BM=64, BN=64, BK=32), DIVISIBLE, options, "matmul")]


def huge():
    options = dict(num_warps=4, num_stages=4)
    return [Request(matmul, TYPES, dict(BM=256, BN=256, BK=128), DIVISIBLE, options, "matmul")]
"""


@pytest.fixture(autouse=True)
def programs(needs: Any) -> None:
    needs(*tools.FOR_AOT)


@pytest.fixture
def requests(kernels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that lists kernels."""
    (tmp_path / "listed_kernels.py").write_text(REQUESTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "listed_kernels"


@pytest.fixture
def report(requests: str) -> aot.Report:
    import importlib

    (one,) = importlib.import_module(requests).small()
    return aot.report(one.kernel, one.signature, one.constexprs, one.divisible, one.options, ["sm_80", "sm_90"])


def test_a_report_has_registers_shared_memory_and_tensor_cores(report: aot.Report) -> None:
    a100 = report["sm_80"]
    assert report.ok and 0 < a100.registers <= 255 and 0 < a100.shared < a100.shared_limit
    assert 0 < a100.occupancy <= 1 and a100.blocks_per_sm >= 1 and a100.limited_by
    assert a100.loop_mix["HMMA"] and a100.loop_mix["LDGSTS"] and report["sm_90"].loop_mix["HGMMA"]


def test_an_estimate_says_that_it_is_one(report: aot.Report) -> None:
    found = estimate.kernel(
        report["sm_80"], "A100", blocks=4096, iterations=128, flops=2 * 4096**3, dram_bytes=6 * 4096**2
    )
    assert str(found).startswith("[ESTIMATE, NOT MEASURED, +-30 %]") and "TFLOP/s" in str(found)
    assert found.fastest <= found.seconds <= found.slowest and found.tail >= 1
    with pytest.raises(ValueError, match="A5000 needs a report for sm_86 of a kernel with a loop"):
        estimate.kernel(report["sm_80"], "A5000", blocks=1, iterations=1)
    with pytest.raises(ValueError, match="only the matrix instructions of sm_80 and sm_86"):
        estimate.pipe_cycles(report["sm_90"].loop, estimate.CHIPS["A100"])


def test_memory_bound_kernels_take_the_bytes_time() -> None:
    found = estimate.memory("A100", dram_bytes=1.7e9, launches=2)
    assert found.seconds == pytest.approx(1e-3 + 10e-6) and found.bound == "memory"


def test_the_command_fails_for_what_cannot_run(requests: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert aot.main([f"{requests}:small", "--targets", "sm_80", "--strict"]) == 0
    assert aot.main([f"{requests}:huge", "--targets", "sm_80", "--strict"]) == 1
    assert "shared memory over 166912 B" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        aot.main([requests])
    assert "needs module:function" in capsys.readouterr().err


def test_other_makers_gpus_are_compiled_for(requests: str, kernels: Any) -> None:
    types, sizes = {"X": "*fp32", "Y": "*fp32", "stride": "i32", "N": "i32"}, {"BLOCK": 128}
    report = aot.report(kernels.softmax, types, sizes, targets=["gfx942"])
    assert report.ok and report["gfx942"].registers > 0 and report["gfx942"].shared_limit == 64 * 1024


def test_an_error_of_the_compiler_is_part_of_the_report(kernels: Any) -> None:
    report = aot.report(kernels.softmax, {"X": "*fp32", "Y": "*fp32", "stride": "i32", "N": "i32"}, {"BLOCK": 100})
    assert not report.ok and "does not compile" in report["sm_80"].problems
    assert "kernel" in aot.table([report]) and report["sm_80"].error in aot.table([report])
