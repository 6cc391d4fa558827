from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import oner_fast.cli
from oner_fast.benchmarks import cli
from oner_fast.benchmarks.cases import OURS, Case
from oner_fast.benchmarks.machine import cache_bytes, describe
from oner_fast.benchmarks.measure import Settings
from oner_fast.benchmarks.rows import Quantiles, Row, Times
from oner_fast.remedies import install_extra_command

Measure = Callable[[Case, Settings, Callable[[str], None]], Row]


def fake(wrong: str = "", interrupt_at: str = "") -> Measure:
    def measure(case: Case, settings: Settings, progress: Callable[[str], None]) -> Row:
        if case.op == interrupt_at:
            raise KeyboardInterrupt
        progress("measuring")
        times = {OURS: Times(1, 2, 3, 5, 0), "eager": Times(2, 4, 6, 5, 0)}
        twice = Quantiles(2, 2, 2)
        row = Row(case.op, case.shape, "float32", "cpp", times, best="eager", speedup=twice, eager="eager")
        row.speedup_eager = twice
        if case.op == wrong:
            row.refused[OURS] = "result 0: relative error 1, allowed 0.1"
        return row

    return measure


def run(*arguments: str) -> int:
    return oner_fast.cli.main(["bench", "ops", *arguments])


def test_the_command_writes_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "measure", fake())
    assert run("--quick", "--op", "token_alignment", "masked_gather", "--out", str(tmp_path / "new")) == 0
    data = json.loads((tmp_path / "new" / "results.json").read_text())
    assert data["finished"] and [row["op"] for row in data["rows"]] == ["masked_gather", "token_alignment"]
    assert data["machine_facts"]["threads"] == torch.get_num_threads()
    assert (tmp_path / "new" / "speed.svg").exists()
    assert "machine: " in capsys.readouterr().out
    assert "![speed]" in (tmp_path / "new" / "report.md").read_text()


def test_a_wrong_result_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "measure", fake(wrong="gather_patches"))
    assert run("--quick", "--out", str(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "gather_patches" in said and "refused: oner_fast: result 0: relative error 1" in said


def test_ctrl_c_keeps_the_finished_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "measure", fake(interrupt_at="mixup_info_nce"))
    assert run("--quick", "--out", str(tmp_path)) == 130
    data = json.loads((tmp_path / "results.json").read_text())
    assert not data["finished"] and [row["op"] for row in data["rows"]] == ["masked_gather", "gather_patches"]
    assert "not finished" in (tmp_path / "report.md").read_text()


def test_without_jinja2_a_notice_replaces_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "measure", fake())
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run("--quick", "--op", "masked_gather", "--out", str(tmp_path)) == 0
    assert capsys.readouterr().err.count(install_extra_command("bench")) == 1
    assert not (tmp_path / "report.html").exists() and (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "gather"], "unknown op 'gather'; known: masked_gather, gather_patches"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--seconds", "-1"], "--seconds must be positive, got -1"),
        (["--seconds", "nan"], "--seconds must be positive, got nan"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--device", "cuda") == 2
    assert "--device cuda needs a GPU that torch can use" in capsys.readouterr().err


def test_out_must_not_be_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run("--out", str(tmp_path / "file")) == 2
    assert "--out must be a folder" in capsys.readouterr().err


def test_the_machine_line_names_the_facts_a_figure_depends_on() -> None:
    line = describe().line()
    for words in (f"{torch.get_num_threads()} threads", f"torch {torch.__version__}", "kernels", "load ", "Python "):
        assert words in line
    assert cache_bytes() >= 2**20
