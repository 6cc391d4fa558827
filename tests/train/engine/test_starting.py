"""A training that fails before its first result leaves nothing behind, and takes nothing that was there."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from oner_fast.cli import main
from oner_fast.train.engine.run_lock import run_lock
from oner_fast.train.engine.starting import nothing_left_by_a_failed_start


def fail(folder: Path, *written: str, enabled: bool = True) -> None:
    with pytest.raises(RuntimeError, match="boom"), nothing_left_by_a_failed_start(folder, enabled):
        for name in written:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("" if name == "metrics.jsonl" else "x")
        raise RuntimeError("boom")


def test_what_was_written_goes_and_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    fail(tmp_path, "config.json", "tokenizer.json", "metrics.jsonl", "tensorboard/events", "snapshots/step-0.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "notes.txt"]


@pytest.mark.parametrize("result", ["checkpoints/step-00000004.pt", "model.safetensors"])
def test_results_keep_everything(tmp_path: Path, result: str) -> None:
    fail(tmp_path, "config.json", result)
    assert (tmp_path / "config.json").exists() and (tmp_path / result).exists()


def test_logged_steps_keep_everything(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    fail(tmp_path, "config.json")
    assert (tmp_path / "config.json").exists()


def test_other_ranks_remove_nothing(tmp_path: Path) -> None:
    fail(tmp_path, "config.json", enabled=False)
    assert (tmp_path / "config.json").exists()


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "kept").write_text("x")
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(RuntimeError), nothing_left_by_a_failed_start(run, True):
        (run / "new").symlink_to(tmp_path / "data")
        raise RuntimeError
    assert list(run.iterdir()) == []
    assert (tmp_path / "data" / "kept").exists()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.tar", 9)


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "held-out.tar", 200)


def write_pairs(path: Path, blue: int) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(9):
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), (9 * number, 99, blue)).save(picture, "PNG")
            for name, data in ((f"{number}.png", picture.getvalue()), (f"{number}.txt", b"a red cat")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


SMALL = {
    "batch-size": 4, "workers": 0, "threads": 1, "width": 32, "depth": 1, "heads": 2, "embed-dim": 16,
    "projector-hidden": 32, "predictor-hidden": 32, "snapshot-every": 0, "save-every": 100, "log-every-n-steps": 1,
}  # fmt: skip


def train(data: Path, run: Path, *flags: str) -> int:
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    try:
        return main(["train", "oner", "--train-data", str(data), "--run-dir", str(run), *words, *flags])
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--train-data", "nowhere.tar"], "nowhere.tar"),
        (["--heads", "5"], "heads"),
        (["--batch-size", "1000"], "1000"),
        (["--resume", "gone.pt"], "gone.pt"),
        (["--tokenizer", "gone.json"], "gone.json"),
    ],
)
def test_a_command_that_cannot_start_leaves_no_folder(
    pairs: Path, tmp_path: Path, flags: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(pairs, tmp_path / "runs" / "mine", *flags) in (1, 2)
    assert why in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_short_training_names_its_model_and_the_next_command(
    pairs: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(pairs, run, "--steps", "6", "--learnable-temperature") == 0
    printed = capsys.readouterr().out
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cudnn.allow_tf32
    assert "--warmup 50 becomes 0" in printed  # 6 of the recipe's 600 steps
    assert f"the model is {run / 'model.safetensors'}; next: oner-fast eval {run}" in printed
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["logit_scale"] == pytest.approx(5.0, abs=0.1) for line in lines)
    assert lines[0]["logit_scale"] != lines[-1]["logit_scale"]
    optim = json.loads((run / "config.json").read_text())["optim"]
    assert (optim["steps"], optim["warmup"]) == (6, 0)
    before = (run / "model.safetensors").read_bytes()
    assert train(pairs, run, "--steps", "6", "--learnable-temperature", "--val-data", str(held_out)) == 0
    assert "step 6 of 6 was done already; to train on, begin a new phase with --resume" in capsys.readouterr().out
    assert (run / "model.safetensors").read_bytes() == before
    assert json.loads((run / "config.json").read_text())["data"]["val_data"] == str(held_out)


def test_snapshots_come_from_the_validation_data(
    pairs: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    snapshots = ("--snapshot-every", "2", "--steps", "2", "--warmup", "0")
    assert train(pairs, tmp_path / "none", *snapshots) == 0
    assert not (tmp_path / "none" / "snapshots").exists()
    copy = tmp_path / "validation.tar"
    copy.write_bytes(pairs.read_bytes())
    capsys.readouterr()
    assert train(pairs, run, *snapshots, "--val-data", str(copy)) == 1
    assert f"val_data {copy} is trained on (a copy with the same bytes as {pairs})" in capsys.readouterr().err
    assert train(pairs, run, *snapshots, "--val-data", str(held_out)) == 0
    assert len(list((run / "snapshots").iterdir())) == 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spaces = {"gap/backbone", "gap/projection", "gap/predictor", "gap/teacher"}
    # The gap before the first step, and that of the last step in its own line.
    assert [line["step"] for line in lines] == [0, 1, 2] or [line["step"] for line in lines] == [0, 2]
    assert lines[0].keys() == {"step", *spaces} and spaces <= lines[-1].keys()


def test_a_folder_that_another_training_put_in_its_place_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RuntimeError), run_lock(run), nothing_left_by_a_failed_start(run, True):
        run.rename(tmp_path / "moved")
        run.mkdir()
        (run / "config.json").write_text("another training's")
        raise RuntimeError
    assert (run / "config.json").read_text() == "another training's"
