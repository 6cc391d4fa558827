"""A dry run: one rank's report, the same number of steps on every rank, and a run that is there stays as it is."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from oner_fast.train.engine import dry_run
from oner_fast.train.engine.dry_run import DryRun
from oner_fast.train.oner import __main__ as oner


def make_pairs(folder: Path) -> Path:
    """A tar of a dozen captioned images."""
    folder.mkdir()
    with tarfile.open(folder / "train-000000.tar", "w") as tar:
        for i in range(12):
            png = io.BytesIO()
            Image.new("RGB", (20, 14 + i), (12 * i, 255 - 12 * i, 7 * i)).save(png, "PNG")
            for name, data in ((f"{i:04d}.png", png.getvalue()), (f"{i:04d}.txt", f"image {i}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def command(data: Path, run: Path) -> list[str]:
    given: dict[str, Any] = {
        "train_data": data, "run_dir": run, "image_size": 12, "patch_size": 4, "width": 16, "depth": 1, "heads": 2,
        "embed_dim": 8, "projector_hidden": 16, "predictor_hidden": 16, "max_text_tokens": 8, "tokenizer_vocab": 80,
        "batch_size": 8, "steps": 3, "warmup": 1, "save_every": 3, "log_every_n_steps": 1, "snapshot_every": 0,
        "workers": 0, "threads": 1, "precision": "fp32", "device": "cpu", "accum_freq": 2,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_a_dry_run_leaves_an_existing_run_unchanged(tmp_path: Path, check_dry_run: Any) -> None:
    words = command(make_pairs(tmp_path / "data"), tmp_path / "run")
    assert oner.main(words) == 0
    check_dry_run(oner.main, words, "3 steps of 8 samples")


def test_a_failed_dry_run_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(tmp_path / "absent", tmp_path / "run")
    assert oner.main([*words, "--dry-run"]) == 1
    assert "absent" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_slow_step_is_taken_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "_SECONDS", 0.0)
    assert oner.main([*command(make_pairs(tmp_path / "data"), tmp_path / "run"), "--dry-run"]) == 0
    assert "(the first step, with its warm-up)" in capsys.readouterr().out


def test_the_report_counts_hours_of_the_whole_run() -> None:
    found = DryRun(4, 3, samples=256, seconds_per_step=0.5, data_wait=0.1, peak_memory=3 * 2**29, loss=1.0)
    assert found.report(14_400, torch.device("cuda")).splitlines() == [
        "memory  1.50 GiB at the peak of the GPU",
        "pace    512.0 samples/s, 0.500 s a step, 10% of it waiting for data (the last 3 of 4 steps)",
        "run     14400 steps of 256 samples: 2.00 hours",
        "loss    1.0000",
    ]


def test_two_ranks_leave_nothing(tmp_path: Path, run_two_ranks: Any) -> None:
    data = make_pairs(tmp_path / "data")
    run_two_ranks(__file__, data, tmp_path / "run")
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "train-000000.tar"]


def _rank(rank: int, size: int, data: Path, run: Path) -> int:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20_000 + os.getppid() % 20_000))
    return oner.main([*command(data, run), "--dry-run"])


if __name__ == "__main__":
    raise SystemExit(_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])))
