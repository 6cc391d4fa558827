"""The training of a CLIP: open_clip loads the run, micro-batches and interruptions change nothing, stage 2 learns."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from oner_fast.data.batch import PairBatch, no_text
from oner_fast.models.clip import CLIPConfig, load_clip
from oner_fast.models.files import load_uta, read_metadata, save_uta
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.teacher import load_teacher
from oner_fast.models.uta import UTA, UTAConfig
from oner_fast.train.clip import __main__ as clip
from oner_fast.train.clip.step import ContrastStep
from oner_fast.train.clip.towers import NewTowers
from oner_fast.train.engine import loop
from oner_fast.train.engine.distributed import World, setup, shutdown

WORLD = World(0, 1, 0, torch.device("cpu"))
SIZES = {
    "image_size": 16, "patch_size": 8, "vision_width": 16, "vision_layers": 1, "vision_heads": 2, "text_width": 16,
    "text_layers": 1, "text_heads": 2, "context_length": 8, "embed_dim": 8,
}  # fmt: skip
TIMES = {"seconds", "samples_per_second", "data_wait", "mfu"}
COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "white": (250, 250, 250)}


def make_pairs(folder: Path) -> Path:
    """Two dozen pictures of one colour, captioned with it."""
    folder.mkdir()
    with tarfile.open(folder / "train-000000.tar", "w") as tar:
        for i in range(24):
            name, colour = list(COLOURS.items())[i % 4]
            png = io.BytesIO()
            Image.new("RGB", (20, 16 + i), colour).save(png, "PNG")
            caption = f"a {name} picture {'very ' * (i % 3)}big"
            for file, data in ((f"{i:04d}.png", png.getvalue()), (f"{i:04d}.txt", caption.encode())):
                member = tarfile.TarInfo(file)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def command(data: Path, run: Path, **changes: Any) -> list[str]:
    given: dict[str, Any] = {
        **SIZES, "train_data": data, "run_dir": run, "batch_size": 8, "steps": 8, "warmup": 2, "lr": 0.01,
        "save_every": 3, "log_every_n_steps": 1, "workers": 0, "threads": 1, "precision": "fp32", "device": "cpu",
    }  # fmt: skip
    words = []
    for name, value in {**given, **changes}.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def figures(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pairs, and a CLIP trained on them."""
    optional_package("open_clip")  # or every test is skipped for want of it
    folder = tmp_path_factory.mktemp("straight")
    data = make_pairs(folder / "pairs")
    assert clip.main(command(data, folder / "run")) == 0
    return data, folder / "run"


def test_the_towers_learn_and_open_clip_loads_the_run(straight: tuple[Path, Path]) -> None:
    _, run = straight
    lines = figures(run)
    assert len(lines) == 8 and lines[-1]["loss"] < lines[0]["loss"]
    assert all(0 <= line["repeated_captions"] <= 1 for line in lines)
    assert lines[0]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-3) != lines[-1]["logit_scale"]
    model, config = load_clip(run)
    assert config == CLIPConfig(**SIZES)
    theirs, _, preprocess = optional_package("open_clip").create_model_and_transforms(f"local-dir:{run}")
    picture = preprocess(Image.new("RGB", (20, 20), (250, 10, 10))).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model.encode_image(picture), theirs.eval().encode_image(picture))
    assert load_teacher(run).logit_scale == pytest.approx(lines[-1]["logit_scale"], rel=1e-2)


def test_a_rate_that_was_too_low_is_measured_again(
    straight: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something else kept the processor busy before the first step: MFU is no more than 1 all the same."""
    asked = []

    def rate(device: torch.device, dtype: torch.dtype, *, again: bool = False) -> float:
        asked.append(again)
        return 1e18 if again else 1.0

    monkeypatch.setattr(loop, "gemm_rate", rate)
    assert clip.main(command(straight[0], tmp_path / "run", steps=5)) == 0
    shares = [json.loads(line).get("mfu") for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [share for share in shares if share is not None]
    assert asked == [False, True] and found and all(0 < share < 1 for share in found)


def test_a_resumed_run_equals_an_uninterrupted_one(straight: tuple[Path, Path], tmp_path: Path) -> None:
    data, whole = straight
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    name = "step-00000006.pt"
    (run / "checkpoints" / name).write_bytes((whole / "checkpoints" / name).read_bytes())
    assert clip.main(command(data, run)) == 0
    file = "open_clip_model.safetensors"
    assert (run / file).read_bytes() == (whole / file).read_bytes()
    assert figures(run) == figures(whole)[6:]


def pairs() -> PairBatch:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=draw)
    captions = [f"a {'very ' * (i % 4)}{name} thing" for i, name in enumerate([*COLOURS] * 2)]
    captions[:4] = [each.upper() for each in captions[:4]]
    return PairBatch(images, no_text(8), torch.arange(8), captions, 0, 0)


def gradients(
    batch: PairBatch, parts: int = 1, world: World = WORLD, same_caption: Any = "ignore"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a step of the same towers each time, and the gradient of every parameter."""
    torch.manual_seed(0)
    towers = NewTowers(CLIPConfig(**SIZES), 0.07)
    loss = ContrastStep(towers, parts, world, None, same_caption)(batch)
    found = {name: parameter.grad for name, parameter in towers.named_parameters() if parameter.grad is not None}
    assert len(found) == len(list(towers.parameters()))
    return loss, found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and all(gradient.any() for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("same_caption", ["negative", "positive", "ignore"])
def test_micro_batches_change_nothing(same_caption: str) -> None:
    loss, wanted = gradients(pairs(), same_caption=same_caption)
    again, found = gradients(pairs(), parts=4, same_caption=same_caption)
    torch.testing.assert_close(again, loss)
    assert_same(found, wanted)


def test_same_captions_are_negatives_positives_or_left_out() -> None:
    """Each of the four captions stands twice in the batch, once in capitals.

    The text tower, which folds case, gives both the same embedding, and equal logits share their mass in vain.
    """
    batch = pairs()
    assert len(batch.caption_ids.unique()) == 4
    positive, negative, ignore = (
        float(gradients(batch, same_caption=x)[0]) for x in ("positive", "negative", "ignore")
    )
    assert ignore < negative - 0.01 and positive == pytest.approx(negative, rel=1e-6)


def rank_main(rank: int, size: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    world = setup("cpu", init_method=f"file://{folder}/meet", timeout_seconds=60)
    try:
        torch.save(gradients(pairs().split(size)[rank], parts=2, world=world), f"{folder}/{rank}.pt")
    finally:
        shutdown()


def test_two_processes_train_like_one(run_two_ranks: Any, tmp_path: Path) -> None:
    loss, wanted = gradients(pairs())
    run_two_ranks(__file__, tmp_path)
    for rank in range(2):
        found, theirs = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, loss)
        assert_same(theirs, wanted)


def test_the_second_stage_moves_the_student_alone(straight: tuple[Path, Path], tmp_path: Path) -> None:
    data, teacher = straight
    torch.manual_seed(1)
    student = UTA(UTAConfig(image_size=16, patch_size=4, width=16, depth=1, heads=2, mlp_hidden=24, embed_dim=8))
    save_uta(tmp_path / "uta" / "model.safetensors", student, {"teacher": str(teacher)})
    towers = {"init_image": tmp_path / "uta", "init_text": teacher, "lock_text": True}
    assert clip.main(command(data, tmp_path / "run", **towers)) == 0
    moved = load_uta(tmp_path / "run" / "model.safetensors")
    assert read_metadata(tmp_path / "run" / "model.safetensors")["teacher"] == str(teacher)
    assert not torch.equal(moved.head.weight, student.head.weight)
    lines = figures(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"init_image": "x"}, "go together"),
        ({"init_image": "x", "init_text": "y"}, "--lock-text"),
        ({"lock_image": True}, "need towers to start from"),
        ({"temperature": 0.001}, "temperature must be at least 0.01"),
        ({"vision_heads": 3}, "vision_width must be a multiple of vision_heads"),
    ],
)
def test_wrong_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, text: str) -> None:
    with pytest.raises(SystemExit) as stop:
        clip.main(command(tmp_path, tmp_path / "run", **changes))
    assert stop.value.code == 2
    assert text in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_dry_run_leaves_nothing(straight: tuple[Path, Path], tmp_path: Path, check_dry_run: Any) -> None:
    check_dry_run(clip.main, command(straight[0], tmp_path / "runs" / "new"), "8 steps of 8 samples")


def test_a_clip_begins_with_the_weights_of_another_at_another_size(straight: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = straight
    before, _ = load_clip(run)
    still = {"steps": 1, "warmup": 0, "lr": 0.0, "min_lr": 0.0, "image_size": 24, "context_length": 9}
    for name, source in (("run", run), ("checkpoint", run / "checkpoints" / "step-00000008.pt")):
        assert clip.main(command(data, tmp_path / name, init_from=source, **still)) == 0
        after, config = load_clip(tmp_path / name)
        assert (config.image_size, config.context_length) == (24, 9)
        there, here = before.state_dict(), after.state_dict()
        resampled = {key for key in there if not torch.equal(there[key], here[key])}
        assert resampled == {"visual.positional_embedding", "positional_embedding"}
        assert here["visual.positional_embedding"].shape == (10, 16) and here["positional_embedding"].shape == (9, 16)
        assert json.loads((tmp_path / name / "lineage.json").read_text())["lineage"][0]["kind"] == "weights"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"vision_width": 32}, "vision_width 16, and this training needs vision_width 32; give --vision-width 16"),
        ({"init_image": "a", "init_text": "b", "lock_text": True}, "give either --init-from"),
    ],
)
def test_weights_that_do_not_fit_a_clip_are_refused(
    straight: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], why: str
) -> None:
    data, run = straight
    assert clip.main(command(data, tmp_path / "new", init_from=run, **changes)) == 1
    assert why in capsys.readouterr().err


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
