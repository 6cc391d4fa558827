"""A user's own pairs, from a CSV to a loaded model: data, train, eval, report, load."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import oner_fast
from oner_fast import cli

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}
SHADES = ["pale", "deep", "soft", "loud", "calm", "warm", "cool", "flat", "rich", "dull", "grey", "dusty"]
SMALL = (
    "--image-size 16 --patch-size 8 --width 16 --depth 1 --heads 2 --embed-dim 8 --projector-hidden 16 "
    "--predictor-hidden 16 --steps 4 --warmup 1 --batch-size 8 --save-every 4 "
    "--snapshot-every 2 --threads 1 --workers 1"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "pictures").mkdir()
    with open(folder / "pairs.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filepath", "title"])
        for number, shade in enumerate(SHADES):
            for name, colour in COLOURS.items():
                path = folder / "pictures" / f"{shade}-{name}.png"
                Image.new("RGB", (20, 24), tuple((part + 7 * number) % 256 for part in colour)).save(path)
                rows.writerow([str(path), f"{shade} {name} square"])
    data = folder / "data"
    command = ["data", "pairs", str(folder / "pairs.csv"), "--output", str(data), "--csv-separator", ","]
    assert cli.main(command) == 0
    assert cli.main(["train", "oner", "--train-data", str(data), "--run-dir", str(folder / "run"), *SMALL.split()]) == 0
    return folder / "run"


def test_every_pair_is_in_one_split(run: Path) -> None:
    splits = json.loads((run.parent / "data" / "dataset.json").read_text())["splits"]
    assert sum(split["samples"] for split in splits.values()) == len(SHADES) * len(COLOURS)
    assert splits["val"]["samples"] > 0


def test_the_pairs_are_evaluated(run: Path) -> None:
    assert cli.main(["eval", str(run)]) == 0
    figures = json.loads((run / "evaluation.json").read_text())["val"]
    assert 0 <= figures["image_to_text"]["R@1"] <= figures["image_to_text"]["R@10"]
    assert cli.main(["report", str(run)]) == 0
    assert "square" in (run / "report.html").read_text()


def test_the_model_loads_and_embeds(run: Path) -> None:
    model = oner_fast.load(run)
    picture = Image.new("RGB", (40, 30), COLOURS["red"])
    image, text = model.encode_image([picture]), model.encode_text(["deep red square"])
    both = model.encode_image_text([picture], ["deep red square"])
    for embedding in (image, text, both):
        assert embedding.shape == (1, 8) and embedding.dtype == torch.float32
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(1))
    assert model.encode_patches([picture]).shape == (1, 4, 8)
