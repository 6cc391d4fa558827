"""`--eval-every`: figures, the best model, an exact resume, and two ranks."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import oner_fast
from oner_fast.cli import main
from oner_fast.train.engine.best import SCORE, Best

WORDS = ["red square", "blue circle", "green arrow", "yellow cat", "black dog", "white bird", "grey house", "pink car"]
SMALL = {
    "steps": 6, "warmup": 0, "batch-size": 4, "workers": 0, "threads": 1, "width": 32, "depth": 1, "heads": 2,
    "embed-dim": 16, "projector-hidden": 32, "predictor-hidden": 32, "snapshot-every": 0, "save-every": 3,
    "log-every-n-steps": 3, "eval-every": 2,
}  # fmt: skip


def write_pairs(path: Path, first: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number, caption in enumerate(WORDS, first):
            pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            picture = io.BytesIO()
            Image.fromarray(pixels).resize((16, 16)).save(picture, "PNG")
            for name, data in ((f"{number}.png", picture.getvalue()), (f"{number}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_pairs(folder / "train-0.tar", 0)
    write_pairs(folder / "val-0.tar", 100)
    return folder


def train(data: Path, run: Path, *flags: str) -> int:
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return main(["train", "oner", "--train-data", str(data), "--run-dir", str(run), *words, *flags])


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures(run: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: {k: v for k, v in line.items() if k.startswith("eval/")} for line in lines(run)}


def evaluated(folder: Path) -> dict[str, float]:
    """Evaluate a folder by the command, in the names of the metrics."""
    assert main(["eval", str(folder)]) == 0
    val = json.loads((folder / "evaluation.json").read_text())["val"]
    ways = ("image_to_text", "text_to_image")
    found = {f"eval/{way}/R@{k}": val[way][f"R@{k}"] for way in ways for k in (1, 5, 10)}
    found |= {f"eval/zero_shot/{top}": val["zero_shot"][top] for top in ("top1", "top5")}
    return found | {"eval/modality_gap": val["modality_gap"], "eval/damaged": val["damaged"]}


def check_best(run: Path) -> None:
    """The best model's figures are those of `oner-fast eval` on its folder."""
    best = json.loads((run / "best" / "best.json").read_text())
    of_step = figures(run)[best.pop("step")]
    assert of_step == best
    scores = [found[SCORE] for found in figures(run).values() if found]
    assert best[SCORE] == max(scores)
    again = evaluated(run / "best")
    assert best == pytest.approx(again | {SCORE: best[SCORE]}, abs=1e-6)
    assert best[SCORE] == pytest.approx(sum(v for k, v in best.items() if "/R@" in k) / 6)


def test_figures_the_best_model_and_an_exact_resume(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    assert train(data, whole) == 0
    assert "mean recall" in capsys.readouterr().out
    assert {step for step, found in figures(whole).items() if found} == {2, 4, 6}
    assert lines(whole)[-1]["step"] == 6 and {"loss", SCORE} <= lines(whole)[-1].keys()
    check_best(whole)
    assert torch.isfinite(oner_fast.load(whole / "best").encode_text(["a red square"])).all()

    # Evaluating changes nothing in the training.
    assert train(data, tmp_path / "plain", "--eval-every", "0") == 0
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (tmp_path / "plain" / "best").exists()

    # A run that fails after the evaluation of step 4, whose last checkpoint is of step 3, ends with the same files.
    from oner_fast.train.engine import loop

    resumed, keep = tmp_path / "resumed", loop.Training._evaluated

    def fail(self: Any) -> dict[str, float]:
        found = keep(self)
        if self.steps_done == 4:
            raise RuntimeError("killed")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_evaluated", fail)
        assert train(data, resumed) == 1
    assert train(data, resumed) == 0
    assert figures(resumed) == figures(whole)
    for name in ("model.safetensors", "best/model.safetensors", "best/best.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_what_cannot_be_evaluated_is_refused_at_the_start(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar, run = data / "train-0.tar", tmp_path / "run"
    assert train(tar, run) == 1
    assert f"--eval-every needs validation pairs, and {tar} has no split 'val'" in capsys.readouterr().err
    assert train(data / "*.tar", run, "--val-data", str(data)) == 1
    assert "is trained on (the same file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(data, run, "--eval-every", "-1")
    assert "eval_every must be 0 or more, got -1" in capsys.readouterr().err
    assert not run.exists()


def test_a_tie_and_a_score_that_is_no_number_leave_the_best_one() -> None:
    best = Best()
    assert best.improved(0.25, 2) and not best.improved(0.25, 4) and not best.improved(float("nan"), 6)
    other = Best()
    other.load_state_dict(best.state_dict())
    assert (other.score, other.step) == (0.25, 2) and other.improved(0.5, 8)


def rank_main(rank: int, arguments: list[str]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=arguments[2])
    assert train(Path(arguments[0]), Path(arguments[1]), "--eval-pairs", "7") == 0


def test_two_ranks(data: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(data), str(tmp_path / "run"), str(port)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    run = tmp_path / "run"
    assert {step for step, found in figures(run).items() if found} == {2, 4, 6}
    best = json.loads((run / "best" / "best.json").read_text())
    assert main(["eval", str(run / "best"), "--limit", "7"]) == 0
    val = json.loads((run / "best" / "evaluation.json").read_text())["val"]
    assert val["pairs"] == 7
    assert best["eval/image_to_text/R@5"] == val["image_to_text"]["R@5"]
    assert best["eval/modality_gap"] == pytest.approx(val["modality_gap"], abs=1e-6)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), sys.argv[2:])
