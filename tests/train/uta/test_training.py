"""The training of UTA: what a step minimises, who gets gradients, exact resumption, several processes, clear errors."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from oner_fast.data.batch import PairBatch, no_text
from oner_fast.models.clip import CLIPConfig, build_clip, save_clip
from oner_fast.models.files import load_uta, read_metadata
from oner_fast.models.teacher import load_teacher
from oner_fast.models.uta import UTA, UTAConfig
from oner_fast.nn.drop_path import branch_factors
from oner_fast.nn.positions import resample_grid
from oner_fast.ops.patch_masks import draw_masks
from oner_fast.train.config.common import Optimisation, Run
from oner_fast.train.engine import checkpoint
from oner_fast.train.engine.distributed import World, setup, shutdown
from oner_fast.train.uta import __main__ as uta
from oner_fast.train.uta.inputs import with_cls
from oner_fast.train.uta.settings import Alignment, UTAConfiguration
from oner_fast.train.uta.step import AlignmentStep
from oner_fast.train.uta.teacher_features import TeacherFeatures

WORLD = World(0, 1, 0, torch.device("cpu"))
MODEL = UTAConfig(image_size=24, patch_size=4, width=16, depth=2, heads=2, mlp_hidden=24, embed_dim=8)
REGULARISED: dict[str, Any] = {"drop_path": 0.5, "head_init": "teacher_mean"}
TIMES = {"seconds", "samples_per_second", "data_wait", "mfu"}


def make_teacher(folder: Path, seed: int = 3) -> Path:
    torch.manual_seed(seed)
    config = CLIPConfig(
        image_size=24, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2, text_width=16, text_layers=1,
        text_heads=2, context_length=8, embed_dim=8,
    )  # fmt: skip
    save_clip(folder, build_clip(config), config)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights, whose 3 x 3 patches become the student's 6 x 6 by a larger input."""
    return make_teacher(tmp_path_factory.mktemp("teacher") / "clip")


def settings(teacher: Path, objective: str = "uta", accum_freq: int = 1, **alignment: Any) -> UTAConfiguration:
    return UTAConfiguration(
        model=replace(MODEL, mask_token=objective == "mask_token"),
        alignment=Alignment(teacher=str(teacher), objective=objective, **alignment),  # type: ignore[arg-type]
        optim=Optimisation(batch_size=8, accum_freq=accum_freq),
        run=Run(seed=5),
    )


def pictures(count: int = 8, step: int = 0) -> PairBatch:
    draw = torch.Generator().manual_seed(step)
    images = torch.randint(256, (count, 3, 24, 24), dtype=torch.uint8, generator=draw)
    return PairBatch(images, no_text(count), torch.arange(count), [""] * count, step, 0)


def shaken(config: UTAConfiguration) -> UTA:
    torch.manual_seed(1)
    student = UTA(config.model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student


def step_of(config: UTAConfiguration, world: World = WORLD) -> tuple[AlignmentStep, UTA]:
    student = shaken(config)
    source = load_teacher(config.alignment.teacher, grid=config.model.grid)
    return AlignmentStep(config, student, TeacherFeatures(source), world, None), student


def gradients(student: UTA) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("objective", ["uta", "distillation", "mask_token"])
def test_the_loss_equals_its_formula(teacher: Path, objective: str) -> None:
    config, batch = settings(teacher, objective, mask_ratio=0.4), pictures()
    step, student = step_of(config)
    found = step(batch)
    masks = draw_masks(5, 0, batch.samples, (6, 6), 14, "reversed_block")
    target = load_teacher(teacher, grid=6).tokens(batch.images)
    assert target.shape == (8, 37, 8)
    with torch.no_grad():
        if objective == "mask_token":
            tokens, counts = student(batch.images, masked=masks.mask), F.pad(masks.mask, (1, 0), value=True)
        else:
            tokens, counts = student(batch.images), torch.ones(8, 37, dtype=torch.bool)
        if objective == "uta":
            tokens, counts = student(batch.images, masks.kept), F.pad(~masks.mask, (1, 0), value=True)
            target, counts = target[counts].view(8, 23, 8), torch.ones(8, 23, dtype=torch.bool)
    expected = -F.cosine_similarity(tokens.double(), target.double(), dim=-1)[counts].mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_identical_tokens_give_minus_one(teacher: Path) -> None:
    step, student = step_of(settings(teacher))
    batch = pictures()
    kept = draw_masks(5, 0, batch.samples, (6, 6), 18, "reversed_block").kept
    tokens = student(batch.images, kept).detach()
    target = torch.zeros(8, 37, 8).scatter(1, with_cls(kept).unsqueeze(2).expand(-1, -1, 8), tokens)
    loss = step.loss(step.prepare(batch)[0], target)
    torch.testing.assert_close(loss, torch.tensor(-1.0), rtol=0, atol=1e-6)


def test_only_the_student_gets_gradients_and_hidden_pixels_none(teacher: Path) -> None:
    step, student = step_of(settings(teacher))
    batch = pictures()
    step(batch)
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in step.features.teacher.parameters())
    _, target = step.features.take(batch)
    mask = draw_masks(5, 0, batch.samples, (6, 6), 18, "reversed_block").mask
    pixels = mask.view(8, 1, 6, 6).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = replace(batch, images=torch.where(pixels, 255 - batch.images, batch.images))
    parts = [step.prepare(each)[0] for each in (batch, other)]
    assert torch.equal(step.loss(parts[0], target), step.loss(parts[1], target))
    seen = replace(batch, images=torch.where(pixels, batch.images, 255 - batch.images))
    assert not torch.equal(step.loss(parts[0], target), step.loss(step.prepare(seen)[0], target))


@pytest.mark.parametrize("objective", ["uta", "distillation", "mask_token"])
def test_micro_batches_change_nothing(teacher: Path, objective: str) -> None:
    # With stochastic depth, whose draws belong to places in the whole batch.
    (first, student), (second, other) = (
        step_of(settings(teacher, objective, count, drop_path=0.5)) for count in (1, 4)
    )
    one, two = first(pictures()), second(pictures())
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)
    wanted = gradients(student)
    assert gradients(other).keys() == wanted.keys()
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_skipped_branch_leaves_its_image_alone(teacher: Path) -> None:
    config = settings(teacher, drop_path=0.5)
    student, batch = shaken(config), pictures()
    kept = draw_masks(5, 0, batch.samples, (6, 6), 18, "reversed_block").kept
    factors = branch_factors(0.5, 2, 5, 0, batch.samples)
    assert (factors[2:] == 0).any() and (factors[2:] != 0).any()
    outputs = student(batch.images, kept, branch_factors=factors)
    target = load_teacher(teacher, grid=6).tokens(batch.images)
    aligned = target.gather(1, with_cls(kept).unsqueeze(2).expand(-1, -1, 8))
    found = step_of(config)[0](batch)
    torch.testing.assert_close(found, -F.cosine_similarity(outputs, aligned, dim=-1).mean(), rtol=1e-5, atol=1e-6)
    # Packed, the same; and an image without both branches of the last block ends as without that block.
    flat, bounds = student(batch.images, kept.flatten(), torch.arange(9, dtype=torch.int32) * 18,
                           branch_factors=factors)  # fmt: skip
    torch.testing.assert_close(flat.view_as(outputs), outputs, rtol=1e-5, atol=1e-6)
    assert bounds.tolist() == [19 * i for i in range(9)]
    factors[2:] = 0
    skipped = student(batch.images, kept, branch_factors=factors)
    student.trunk.blocks = student.trunk.blocks[:1]
    torch.testing.assert_close(skipped, student(batch.images, kept), rtol=1e-5, atol=1e-6)


def test_the_head_may_start_towards_the_mean_of_the_teachers_tokens(teacher: Path) -> None:
    config = settings(teacher, head_init="teacher_mean")
    torch.manual_seed(1)
    plain, turned = UTA(config.model), UTA(config.model)
    turned.load_state_dict(plain.state_dict())
    source = load_teacher(teacher, grid=6)
    losses = []
    for student, alignment in ((plain, Alignment(teacher=str(teacher))), (turned, config.alignment)):
        step = AlignmentStep(replace(config, alignment=alignment), student, TeacherFeatures(source), WORLD, None)
        losses.append(float(step(pictures())))
    mean = F.normalize(source.tokens(pictures().images), dim=-1).mean(dim=(0, 1))
    bias = turned.head.bias.detach()
    torch.testing.assert_close(F.normalize(bias, dim=0), F.normalize(mean, dim=0))
    assert bias.norm().item() == pytest.approx(turned.head.weight.norm().item(), rel=1e-5)
    assert losses[1] < losses[0] - 0.1
    # Only the first step of a new head turns it: what was learnt stays, also after a restart.
    step(pictures(count=4))
    assert torch.equal(turned.head.bias, bias)
    with torch.no_grad():
        turned.head.bias.zero_()
    step(pictures(step=1))
    assert not turned.head.bias.any()


def rank_main(rank: int, size: int, folder: str, teacher: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    world = setup("cpu", init_method=f"file://{folder}/meet", timeout_seconds=60)
    try:
        step, student = step_of(settings(Path(teacher), **REGULARISED), world)
        loss = step(pictures().split(size)[rank])
        torch.save((loss, gradients(student)), f"{folder}/{rank}.pt")
    finally:
        shutdown()


def test_two_processes_train_like_one(teacher: Path, run_two_ranks: Any, tmp_path: Path) -> None:
    step, student = step_of(settings(teacher, **REGULARISED))
    loss, wanted = step(pictures()), gradients(student)
    run_two_ranks(__file__, tmp_path, teacher)
    for rank in range(2):
        found, theirs = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-7)
        assert theirs.keys() == wanted.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def make_pictures(folder: Path, count: int = 21) -> Path:
    """A tar of pictures without captions."""
    import io
    import tarfile

    from PIL import Image

    folder.mkdir()
    with tarfile.open(folder / "train-000000.tar", "w") as tar:
        for i in range(count):
            png = io.BytesIO()
            Image.new("RGB", (20, 14 + i), (12 * i, 255 - 12 * i, 7 * i)).save(png, "PNG")
            member = tarfile.TarInfo(f"{i:04d}.png")
            member.size = png.tell()
            png.seek(0)
            tar.addfile(member, png)
    return folder


def command(data: Path, run: Path, source: Path, **changes: Any) -> list[str]:
    given: dict[str, Any] = {
        "train_data": data, "run_dir": run, "teacher": source, "image_size": 24, "patch_size": 4, "width": 16,
        "depth": 1, "heads": 2, "mlp_hidden": 24, "embed_dim": 8, "batch_size": 8, "steps": 6, "warmup": 2, "lr": 0.01,
        "save_every": 2, "log_every_n_steps": 1, "workers": 0, "threads": 1, "precision": "fp32", "device": "cpu",
        "keep_checkpoints": 0,
    }  # fmt: skip
    return [
        word for name, value in {**given, **changes}.items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> tuple[Path, Path]:
    """Pictures, and a run of six steps on them."""
    folder = tmp_path_factory.mktemp("straight")
    data = make_pictures(folder / "pictures")
    assert uta.main(command(data, folder / "run", teacher)) == 0
    return data, folder / "run"


def figures(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(
    straight: tuple[Path, Path], teacher: Path, tmp_path: Path, cached: bool
) -> None:
    data, whole = straight
    cache: dict[str, Any] = {}
    if cached:  # int8, whose rounding shows: a resumed run must see the same tokens as the one that stored them
        cache = {"teacher_cache": tmp_path / "cache", "teacher_cache_dtype": "int8"}
        whole = tmp_path / "whole"
        assert uta.main(command(data, whole, teacher, **cache)) == 0
        assert len(list((tmp_path / "cache").glob("step-*"))) == 6
        assert (whole / "model.safetensors").read_bytes() != (straight[1] / "model.safetensors").read_bytes()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    name = "step-00000002.pt"
    (run / "checkpoints" / name).write_bytes((whole / "checkpoints" / name).read_bytes())
    assert uta.main(command(data, run, teacher, **cache)) == 0
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert figures(run) == figures(whole)[2:]


def test_the_student_learns_and_its_file_names_the_teacher(straight: tuple[Path, Path], teacher: Path) -> None:
    _, run = straight
    losses = [line["loss"] for line in figures(run)]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    model = load_uta(run / "model.safetensors")
    about = read_metadata(run / "model.safetensors")
    state = checkpoint.load(run / "checkpoints" / "step-00000006.pt")
    assert about["teacher"] == str(teacher)
    assert about["teacher_fingerprint"] == load_teacher(teacher, grid=6).fingerprint == state["teacher_fingerprint"]
    assert all(torch.equal(value, state["student"][name]) for name, value in model.state_dict().items())


def test_another_teacher_is_refused(
    straight: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, whole = straight
    other = make_teacher(tmp_path / "other", seed=4)
    state = checkpoint.load(whole / "checkpoints" / "step-00000004.pt")
    step = state.pop("step")
    config = json.loads(state["config"])
    config["alignment"]["teacher"] = str(other)
    checkpoint.save(tmp_path / "run" / "checkpoints", step, {**state, "config": json.dumps(config)}, 0)
    assert uta.main(command(data, tmp_path / "run", other)) == 1
    assert "another teacher" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"teacher": ""}, "UTA needs a teacher"),
        ({"embed_dim": 12}, "give --embed-dim 8"),
        ({"batch_size": 64}, "exceeds the dataset's 21 samples"),
    ],
)
def test_errors_say_what_is_needed(
    straight: tuple[Path, Path],
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    text: str,
) -> None:
    assert uta.main(command(straight[0], tmp_path / "run", teacher, **changes)) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio must be in"),
        ({"objective": "mask_token"}, "needs mask_token=True"),
        ({"recipe": "oner_tiny_pictograms_cpu"}, "belongs to 'oner-fast train oner'"),
    ],
)
def test_wrong_settings(capsys: pytest.CaptureFixture[str], flags: dict[str, Any], text: str) -> None:
    with pytest.raises(SystemExit) as stop:
        uta.main([word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))])
    assert stop.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_leaves_nothing(
    straight: tuple[Path, Path], teacher: Path, tmp_path: Path, check_dry_run: Any
) -> None:
    words = command(straight[0], tmp_path / "run", teacher, teacher_cache=tmp_path / "cache")
    check_dry_run(uta.main, words, "6 steps of 8 samples")


@pytest.mark.parametrize("source", ["", "model.safetensors", "checkpoints/step-00000006.pt"])
def test_a_student_begins_with_the_weights_of_another_at_another_size(
    straight: tuple[Path, Path], teacher: Path, tmp_path: Path, source: str
) -> None:
    data, run = straight
    still = {"steps": 1, "warmup": 0, "lr": 0.0, "min_lr": 0.0, "image_size": 32, "init_from": run / source}
    assert uta.main(command(data, tmp_path / "new", teacher, **still)) == 0
    before = load_uta(run / "model.safetensors")
    after = load_uta(tmp_path / "new" / "model.safetensors").state_dict()
    name = "patch_embedding.positions"
    assert after[name].shape == (64, 16)
    assert torch.equal(after[name], resample_grid(before.patch_embedding.positions.detach(), 8))
    assert all(torch.equal(after[each], value) for each, value in before.state_dict().items() if each != name)


def test_weights_of_another_size_are_refused(
    straight: tuple[Path, Path], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = straight
    assert uta.main(command(data, tmp_path / "new", teacher, init_from=run, heads=4)) == 1
    assert "holds a model of heads 2, and this training needs heads 4; give --heads 2" in capsys.readouterr().err


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
