"""The tools that count GPU kernels without a GPU; their results are in benchmarks/results/gpu_peers.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.gpu import contest, rivals
from oner_fast.benchmarks.gpu.emulated_a100 import count, emulated_a100
from oner_fast.benchmarks.gpuless import tools

FOUND = {
    "error": 1e-3, "allowed": 0.1, "launches": 3, "operations": 1, "dram": 34_000_000, "eager": 1_000_000,
    "sectors": 40_000_000, "instructions": 1000, "tensor_flops": 0, "conflicts": 2,
}  # fmt: skip


@pytest.fixture
def emulator(needs: Callable[..., None]) -> None:
    needs(*tools.FOR_EMULATE)


def test_a_missing_tool_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert rivals.main(["--out", str(tmp_path / "peers.md")]) == 2
    assert "kernels cannot be emulated without no-such-compiler" in capsys.readouterr().err
    assert not (tmp_path / "peers.md").exists()


def test_the_report_says_that_nothing_was_measured_and_why_a_rival_is_missing() -> None:
    entries = [
        rivals.Entry("mixup_info_nce", OURS, FOUND),
        rivals.Entry("mixup_info_nce", "other", {}, "wrong: error 1"),
    ]
    text = rivals.markdown(entries)
    assert "Nothing here was measured" in text and "estimate, +-30 %" in text
    assert "| **oner_fast** | 1.0e-03 | 34.00 |" in text and "20.0, memory" in text  # 34 MB at 1.7 TB/s
    assert "* other: wrong: error 1" in text and "masked_gather" not in text


def test_ours_comes_before_the_rivals() -> None:
    for workload in contest.CASES:
        names = list(contest.contestants(workload))
        assert names[0] == OURS and len(names) > 1
    assert contest.contestants("mixup_info_nce") == {OURS: False, "memeff 0.3.1": False, "inf-cl 1.2.1": True}


def test_eager_operations_count_their_tensors_once(emulator: None) -> None:
    x = torch.ones(1000)
    with emulated_a100() as log:
        counts, results = count(lambda: (x.view(10, 100).t() + x.new_ones(1).expand(100, 10),), log)
    assert results[0].shape == (100, 10)
    # The expanded ones are one number, which is read once.
    assert (counts.launches, counts.operations, counts.eager, counts.dram) == (0, 1, 8004, 8004)


def test_inductors_kernels_run_without_a_gpu(emulator: None) -> None:
    from oner_fast.benchmarks.gpu.inductor import compiled

    def function(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return (x[index] * 2).sum(-1).exp()

    x, index = torch.randn(40, 33).div(8).requires_grad_(), torch.randint(40, (50,))
    with emulated_a100() as log:
        whole = compiled(function)
        whole(x, index)  # traces and generates
        counts, (found,) = count(lambda: (whole(x, index),), log)
        (gradient,) = torch.autograd.grad(found, x, torch.ones_like(found))
    expected = function(x, index)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, x, torch.ones_like(expected))[0])
    assert counts.launches == 1 and counts.eager == 0
    kept = x.numel() + found.numel() + 2 * index.numel()
    assert counts.dram <= 4 * kept + 200
