"""The training of heads on frozen encoders: what moves, what is saved, resuming, and a student of UTA that learns
from it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import oner_fast
from oner_fast.evaluation.cli import main as evaluate
from oner_fast.models.teacher import load_teacher
from oner_fast.train.config.registry import get_recipe
from oner_fast.train.engine import checkpoint
from oner_fast.train.lit import __main__ as lit
from oner_fast.train.uta import __main__ as uta

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "white": (250, 250, 250)}
HEADS = {"image.weight", "image.bias", "text.weight", "text.bias", "logit_scale"}
COMMON = {"batch_size": 8, "warmup": 2, "lr": 0.02, "log_every_n_steps": 1, "workers": 0, "threads": 1,
          "precision": "fp32", "device": "cpu"}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pictures of one colour, captioned with it: two dozen to train on, eight to ask."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    splits: dict[str, Any] = {}
    for split, count in (("train", 24), ("val", 8)):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for i in range(count):
                name, colour = list(COLOURS.items())[i % 4]
                png = io.BytesIO()
                Image.new("RGB", (20, 16 + i), colour).save(png, "PNG")
                for file, content in ((f"{i:04d}.png", png.getvalue()), (f"{i:04d}.txt", f"{name} picture".encode())):
                    member = tarfile.TarInfo(file)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        splits[split] = {"shards": [{"file": f"{split}-000000.tar", "samples": count}]}
    (folder / "dataset.json").write_text(json.dumps({"name": "colours", "format": 1, "splits": splits}))
    return folder


def command(data: Path, run: Path, **changes: Any) -> list[str]:
    given = {"train_data": data, "run_dir": run, **COMMON, **changes}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


SIZES = {"image_size": 8, "grid": 4, "embed_dim": 6, "steps": 8, "save_every": 3}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_heads_learn_alone_and_are_saved_alone(
    data: Path, tmp_path: Path, tiny_encoders: Callable[[int], Any]
) -> None:
    tiny_encoders(0)
    run = tmp_path / "run"
    assert lit.main(command(data, run, **SIZES)) == 0
    found = losses(run)
    assert len(found) == 8 and found[-1] < found[0] - 0.1
    assert load_file(run / "lit_model.safetensors").keys() == HEADS
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None
    state = checkpoint.load(newest)
    assert state["student"].keys() == {f"heads.{name}" for name in HEADS}
    # While it trains, the newest checkpoint is the same teacher.
    assert isinstance(oner_fast.load(newest).encode_text(["red"]), torch.Tensor)
    whole, partly = oner_fast.load(run), oner_fast.load(newest)
    torch.testing.assert_close(whole.encode_text(["red"]), partly.encode_text(["red"]))
    first = load_file(run / "lit_model.safetensors")["text.weight"]

    # Resumed, it is the same as uninterrupted, to the last bit.
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    name = "step-00000006.pt"
    (again / "checkpoints" / name).write_bytes((run / "checkpoints" / name).read_bytes())
    assert lit.main(command(data, again, **SIZES)) == 0
    assert torch.equal(load_file(again / "lit_model.safetensors")["text.weight"], first)
    assert losses(again) == found[6:]


def test_the_best_heads_are_kept(data: Path, tmp_path: Path, tiny_encoders: Callable[[int], Any]) -> None:
    tiny_encoders(0)
    run = tmp_path / "run"
    assert lit.main(command(data, run, **SIZES | {"eval_every": 3})) == 0
    best = json.loads((run / "best" / "best.json").read_text())
    assert best["step"] in (3, 6, 8)
    assert evaluate([str(run / "best")]) == 0
    val = json.loads((run / "best" / "evaluation.json").read_text())["val"]
    for way in ("image_to_text", "text_to_image"):
        assert [best[f"eval/{way}/R@{k}"] for k in (1, 5, 10)] == [val[way][f"R@{k}"] for k in (1, 5, 10)]
    assert best["eval/zero_shot/top1"] == val["zero_shot"]["top1"]


def test_micro_batches_change_nothing(data: Path, tmp_path: Path, tiny_encoders: Callable[[int], Any]) -> None:
    tiny_encoders(0)
    for parts in (1, 4):
        assert lit.main(command(data, tmp_path / f"{parts}", **SIZES | {"steps": 3, "accum_freq": parts})) == 0
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


def test_a_trained_model_retrieves_every_colour(
    data: Path, tmp_path: Path, tiny_encoders: Callable[[int], Any]
) -> None:
    tiny_encoders(0)
    run = tmp_path / "run"
    assert lit.main(command(data, run, **SIZES | {"steps": 60, "lr": 0.1})) == 0
    assert evaluate([str(run), "--data", str(data)]) == 0
    val = json.loads((run / "evaluation.json").read_text())["val"]
    assert val["pairs"] == 8 and val["image_to_text"]["gallery"] == 4
    assert val["image_to_text"]["R@1"] == val["text_to_image"]["R@1"] == 1.0


def test_other_encoders_cannot_resume(
    data: Path, tmp_path: Path, tiny_encoders: Callable[[int], Any], capsys: Any
) -> None:
    tiny_encoders(0)
    assert lit.main(command(data, tmp_path / "run", **SIZES | {"steps": 3})) == 0
    tiny_encoders(1)
    assert lit.main(command(data, tmp_path / "run", **SIZES | {"steps": 3})) == 1
    assert "were trained on another image encoder" in capsys.readouterr().err


def test_a_student_learns_from_the_teacher(data: Path, tmp_path: Path, tiny_encoders: Callable[[int], Any]) -> None:
    tiny_encoders(0)
    assert lit.main(command(data, tmp_path / "lit", **SIZES)) == 0
    sizes = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "mlp_hidden": 16, "embed_dim": 6}
    given = {**sizes, "steps": 12, "teacher": tmp_path / "lit"}
    assert uta.main(command(data, tmp_path / "uta", **given)) == 0
    found = losses(tmp_path / "uta")
    assert found[-1] < found[0] - 0.1
    student, teacher = oner_fast.load(tmp_path / "uta"), load_teacher(tmp_path / "lit")
    text = torch.nn.functional.normalize(teacher.encode_text(["red picture"]), dim=-1)
    torch.testing.assert_close(student.encode_text(["red picture"]), text)


def test_the_recipe_fits_the_tiny_student() -> None:
    mine, student = get_recipe("lit_tiny_icons_cpu"), get_recipe("uta_tiny_icons_cpu")
    assert (mine.model.grid, mine.model.embed_dim) == (student.model.grid, student.model.embed_dim)
    assert mine.model.image_size == student.model.image_size


def test_a_temperature_too_low_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lit.main(command(tmp_path, tmp_path / "run", temperature=0.001))
    assert "temperature must be at least 0.01" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_weights_to_begin_with_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lit.main(command(tmp_path, tmp_path / "run", init_from=tmp_path, threads=1)) == 1
    assert "takes no --init-from" in capsys.readouterr().err


def test_a_dry_run_leaves_nothing(
    data: Path, tmp_path: Path, tiny_encoders: Callable[[int], Any], check_dry_run: Any
) -> None:
    tiny_encoders(0)
    check_dry_run(lit.main, command(data, tmp_path / "run", **SIZES), "8 steps of 8 samples")
