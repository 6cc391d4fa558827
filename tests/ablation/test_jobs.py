"""`oner-fast ablate oner --jobs`: runs at a time give the figures of runs one after another, and survive signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from oner_fast.ablation import cli

FLAGS = ["--quick", "--threads", "1", "--device", "cpu", "--seeds", "1", "--equal", "steps", "--rows", "itc", "cmc"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(data: Path, out: Path, *flags: str) -> list[str]:
    words = ["oner_fast", "ablate", "oner", "--data", str(data), "--out", str(out), *FLAGS, *flags]
    return [sys.executable, "-m", *words]


def figures(out: Path) -> dict[str, object]:
    return {
        path.parent.name: json.loads(path.read_text())["val"] for path in sorted(out.glob("runs/*/evaluation.json"))
    }


def started(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many runs have taken steps."""
    end = time.monotonic() + 120
    while sum("loss" in path.read_text() for path in out.glob("logs/*.log")) < count:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_runs_at_a_time_equal_runs_one_after_another(pairs: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main(command(pairs, one, "--steps", "4")[4:]) == 0
    torch.use_deterministic_algorithms(False)
    words = command(pairs, two, "--steps", "4", "--jobs", "2")
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "run 1 of 2: One tower, ITC, seed 0, 4 steps" in done.stdout
    assert "run 2 of 2: OneR: + CMC" in done.stdout
    assert list(figures(two)) == ["cmc-4-seed0", "itc-4-seed0"] and figures(two) == figures(one)
    assert sorted(path.name for path in (two / "logs").iterdir()) == ["cmc-4-seed0.log", "itc-4-seed0.log"]
    assert "2 of 2 runs are done" in (two / "ablation.md").read_text()


def test_a_signal_saves_both_runs_and_they_go_on(pairs: Path, tmp_path: Path) -> None:
    out, long = tmp_path / "study", ["--steps", "64", "--jobs", "2"]
    process = subprocess.Popen(command(pairs, out, *long), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    started(out, 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped; the same command continues from there" in errors
    saved = {path.parent.parent.name for path in out.glob("runs/*/checkpoints/step*")}
    assert saved == {"cmc-64-seed0", "itc-64-seed0"}
    assert not figures(out)
    process = subprocess.Popen(command(pairs, out, *long), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    process.communicate(timeout=300)
    assert process.returncode == 0 and len(figures(out)) == 2
    for log in out.glob("logs/*.log"):
        assert re.search("(resum|continu)", log.read_text(), re.IGNORECASE), log.read_text()


def test_a_killed_study_takes_its_runs_with_it(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    process = subprocess.Popen(command(pairs, out, "--steps", "4000", "--jobs", "2"), env=ENVIRONMENT)
    started(out, 2, process)
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while locks := list(out.glob("runs/*/run.lock")):  # removed at a training's orderly end
        assert time.monotonic() < end, locks
        time.sleep(0.1)


def test_a_failed_run_is_named_with_its_log(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "cmc-4-seed0").write_text("a file where the folder of a run belongs")
    done = subprocess.run(
        command(pairs, out, "--steps", "4", "--jobs", "2"), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 1
    log = out / "logs" / "cmc-4-seed0.log"
    assert "run cmc-4-seed0 ended with status" in done.stderr and str(log) in done.stderr
    assert "cmc-4-seed0" in log.read_text()


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_jobs_are_at_least_one(pairs: Path, tmp_path: Path, jobs: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(pairs, tmp_path / "study", "--jobs", jobs)[4:]) == 1
    assert f"--jobs must be at least 1, got {jobs}" in capsys.readouterr().err
