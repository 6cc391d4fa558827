"""Each loss against a plain float64 formula written from the frame's table, value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.models.oner import OneR
from oner_fast.nn.heads import normalised_pixels
from oner_fast.train.oner.inputs import StudentInput, student_input, teacher_input
from oner_fast.train.oner.objectives import contrastive_losses
from oner_fast.train.oner.settings import Objectives, OneRConfiguration
from oner_fast.train.oner.student import Student


def info_nce(query: Tensor, key: Tensor, scale: Tensor | float, symmetric: bool = False) -> Tensor:
    q, k = query / query.norm(dim=1, keepdim=True), key / key.norm(dim=1, keepdim=True)
    logits = scale * q @ k.T
    rows = torch.stack([logits[i].logsumexp(0) - logits[i, i] for i in range(len(q))]).mean()
    columns = torch.stack([logits[:, i].logsumexp(0) - logits[i, i] for i in range(len(q))]).mean()
    return (rows + columns) / 2 if symmetric else rows


def frame(
    student: dict[Any, Tensor], teacher: dict[Any, Tensor], scale: Tensor | float, symmetric: bool
) -> dict[str, Tensor]:
    """The table of the contrastive frame."""
    mixed = (teacher["image"] + teacher["text"]) / 2

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return info_nce(query, key, scale, symmetric)

    found = {"itc": (loss(student["image"], teacher["text"]) + loss(student["text"], teacher["image"])) / 2}
    found["xmc"] = loss((student["image"] + student["text"]) / 2, mixed)
    if "image_given_text" in student:
        found["cic"] = loss((student["image_given_text"] + student["text_given_image"]) / 2, mixed)
    if "image_text" in student:
        found["cmc"] = loss(student["image_text"], mixed)
    return found


PASSES = ("image", "text", "image_text", "image_given_text", "text_given_image")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("names", [["itc"], ["xmc"], ["cic"], ["cmc"], ["itc", "xmc", "cic", "cmc"]])
def test_contrasts_agree_with_the_papers_table(names: list[str], teacher: bool, symmetric: bool) -> None:
    weights: dict[str, Any] = {name: 0.7 if name in names else 0.0 for name in ("itc", "xmc", "cic", "cmc")}
    objectives = Objectives(**weights, mlm=0, mim=0, symmetric=symmetric, momentum_teacher=teacher)
    query: dict[Any, Tensor] = {name: torch.randn(6, 4, dtype=torch.float64).requires_grad_() for name in PASSES}
    key: dict[Any, Tensor] = (
        {name: torch.randn(6, 4, dtype=torch.float64) for name in ("image", "text")} if teacher else query
    )
    scale = torch.tensor(8.0, dtype=torch.float64).requires_grad_()
    ours = contrastive_losses(query, key, scale, objectives)
    plain = frame(query, key, scale, symmetric)
    assert list(ours) == names
    for name, loss in ours.items():
        torch.testing.assert_close(loss, plain[name], rtol=1e-12, atol=1e-12)
        inputs = [*query.values(), scale]
        mine = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(plain[name], inputs, retain_graph=True, allow_unused=True)
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("same_caption", ["positive", "ignore"])
def test_every_contrast_knows_the_captions(same_caption: Any) -> None:
    """With ids of which all differ, as without; with equal ids, another loss than that of negatives."""
    weights: dict[str, Any] = dict.fromkeys(("itc", "xmc", "cic", "cmc"), 1.0)
    key: dict[Any, Tensor] = {name: torch.randn(6, 4, dtype=torch.float64) for name in PASSES}
    plain = contrastive_losses(key, key, 5.0, Objectives(**weights))
    objectives = Objectives(**weights, same_caption=same_caption)
    for ids, other in ((torch.arange(6), False), (torch.tensor([1, 2, 1, 3, 2, 1]), True)):
        for name, loss in contrastive_losses(key, key, 5.0, objectives, ids=ids).items():
            assert (abs(loss - plain[name]) > 1e-3) == other


# The whole step: what a batch's passes, heads and losses come to, written out.


def hidden_words(student: Student, inputs: StudentInput, name: Any, tokens: Tensor) -> list[Tensor]:
    head, words = student.word_head, student.tower.word_embedding.words.weight
    assert head is not None
    losses = []
    for row, wanted in zip(inputs.words[name].rows.tolist(), inputs.words[name].ids.tolist(), strict=True):
        x = F.gelu(head.transform.weight @ tokens[row] + head.transform.bias)
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * head.norm.weight + head.norm.bias
        logits = words @ x + head.bias
        losses.append(logits.logsumexp(0) - logits[wanted])
    return losses


def hidden_patches(student: Student, inputs: StudentInput, name: Any, tokens: Tensor) -> list[Tensor]:
    """The pixels of a patch less their mean, over their standard deviation; mean absolute error of one linear map."""
    head, image = student.patch_head, {each.name: each.image for each in inputs.passes}[name]
    assert head is not None and image is not None
    losses = []
    for b, place in inputs.patches[name].nonzero().tolist():
        cell = place if image.cells is None else int(image.cells[b, place])
        row, column = divmod(cell, 3)
        patch = image.images[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten().double() / 255
        target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
        losses.append((head.weight @ tokens[b, place] + head.bias - target).abs().mean())
    return losses


def plain_step(
    config: OneRConfiguration, student: Student, teacher: OneR | None, batch: Any, vocabulary: Any
) -> dict[str, Tensor]:
    """Every part of the loss of a batch, unweighted, and their weighted sum under "loss"."""
    objectives, inputs = (
        config.objectives,
        student_input(batch, config.objectives, config.model, config.run.seed, vocabulary),
    )
    outputs = student.tower(inputs.passes)
    query: dict[Any, Tensor] = {name: student.tower.project(output.cls, name) for name, output in outputs.items()}
    key = query
    if teacher is not None:
        key = {name: teacher.project(output.cls, name) for name, output in teacher(teacher_input(batch)).items()}
    if student.predictor is not None:
        text = student.text_predictor or student.predictor
        query = {name: (text if name == "text" else student.predictor)(each) for name, each in query.items()}
    parts = {}
    if objectives.contrastive:
        parts = frame(query, key, student.log_logit_scale.exp(), objectives.symmetric)
    if objectives.mlm:
        words = [hidden_words(student, inputs, name, outputs[name].words) for name in inputs.words]
        parts["mlm"] = torch.stack([one for each in words for one in each]).mean()
    if objectives.mim:
        patches = [hidden_patches(student, inputs, name, outputs[name].patches) for name in inputs.patches]
        parts["mim"] = torch.stack([one for each in patches for one in each]).mean()
    parts = {name: part for name, part in parts.items() if getattr(objectives, name)}
    weights = {name: getattr(objectives, name) for name in parts}
    if objectives.temperature_factor:
        weights |= {name: 2 * objectives.temperature * weights[name] for name in parts if name not in ("mlm", "mim")}
    return {**parts, "loss": torch.stack([weights[name] * part for name, part in parts.items()]).sum()}


SETS: dict[str, dict[str, Any]] = {
    "OneR": {},
    "weights": {"itc": 0.5, "xmc": 2.0, "cic": 3.0, "cmc": 0.25, "mlm": 1.5, "mim": 0.75},
    "patch dropout": {"force_patch_dropout": 0.4, "itc": 0},
    "no contrast": {"itc": 0, "cmc": 0},
    "masked words alone": {"itc": 0, "cmc": 0, "mim": 0},
    "learnable temperature": {"mlm": 0, "mim": 0, "learnable_temperature": True, "symmetric": True},
    "no predictor": {"predictor": "none", "mlm": 0, "mim": 0},
    "a predictor a head": {"predictor": "per_head", "model": {"shared_head": False}, "mlm": 0, "mim": 0},
    "MoCo v3's factor": {"temperature_factor": True, "temperature": 0.3, "xmc": 1.0},
    "no teacher": {"momentum_teacher": False, "symmetric": True, "learnable_temperature": True},
}


@pytest.mark.parametrize("name", list(SETS))
def test_a_step_is_the_weighted_sum_of_plain_formulas(small: Any, name: str) -> None:
    config = small.config(**SETS[name])
    step, student = small.step(config)
    batch = small.batch()
    result = step(batch)
    plain = plain_step(config, student, step.teacher, batch, small.vocabulary)
    masked = config.objectives.mlm or config.objectives.mim
    tolerance = 2e-5 if masked else 1e-9  # the masked losses are summed in float32
    assert set(result.parts) == set(plain) - {"loss"} and not result.loss.requires_grad
    for part, value in result.parts.items():
        torch.testing.assert_close(value.double(), plain[part].detach(), rtol=tolerance, atol=1e-12, msg=part)
    torch.testing.assert_close(result.loss.double(), plain["loss"].detach(), rtol=tolerance, atol=1e-12)
    parameters = {key: value for key, value in student.named_parameters() if value.requires_grad}
    theirs = torch.autograd.grad(plain["loss"], list(parameters.values()), allow_unused=True)
    for (key, parameter), other in zip(parameters.items(), theirs, strict=True):
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wanted = torch.zeros_like(parameter) if other is None else other
        largest = float(wanted.abs().max())
        torch.testing.assert_close(mine, wanted, rtol=0, atol=tolerance * max(largest, 1.0), msg=key)
    if step.teacher is not None:
        assert all(parameter.grad is None for parameter in step.teacher.parameters())


def test_a_caption_masked_nowhere_adds_no_loss(small: Any) -> None:
    config = small.config(itc=0, cmc=0, mim=0, mask_word_ratio=1e-9)
    step, student = small.step(config)
    result = step(small.batch())
    assert result.loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_normalised_pixels() -> None:
    patches = torch.rand(3, 5, 48) * 7 + 3
    found = normalised_pixels(patches)
    torch.testing.assert_close(found.mean(-1), torch.zeros(3, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(-1), torch.ones(3, 5), atol=1e-5, rtol=0)
    flat = normalised_pixels(torch.full((1, 48), 0.3))
    assert flat.abs().max() < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"itc": -1.0}, "must not be negative"),
        ({"itc": 0, "cmc": 0, "mlm": 0, "mim": 0}, "one must be above 0"),
        ({"itc": float("nan")}, "weights of the objectives must not be negative"),
        ({"momentum": 2.0}, r"momentum must be in \[0, 1\], got 2.0"),
        ({"temperature": 0.0}, r"temperature must be at least 0.01 \(logit_scale 100\), got 0.0"),
        ({"mask_patch_ratio": 1.0}, r"mask_patch_ratio must be in \[0, 1\), got 1.0"),
        ({"mask_word_ratio": -0.1}, r"mask_word_ratio must be in \[0, 1\)"),
        ({"force_patch_dropout": 1.0}, r"force_patch_dropout must be in \[0, 1\)"),
        ({"mask_patch_ratio": 0.1}, "mim is above 0 but mask_patch_ratio 0.1 of 9 patches masks none"),
        ({"mask_patch_ratio": 0.3, "force_patch_dropout": 0.7}, "mask_patch_ratio 0.3 of 3 patches masks none"),
        ({"model": {"shared_trunk": False}}, "two trunks .* have no joint pass: set xmc, cic and cmc to 0"),
        ({"predictor": "per_head"}, "predictor per_head needs two heads: give --no-shared-head"),
        ({"temperature_factor": True, "learnable_temperature": True}, "temperature_factor needs a fixed temperature"),
        ({"teacher_view": "second", "momentum_teacher": False}, "teacher_view second needs a teacher"),
        ({"equal_heads": True}, "equal_heads needs two heads: give --no-shared-head"),
        ({"init_gap": -1.0}, "init_gap must not be negative, got -1.0"),
        ({"accum_freq": 3}, "batch_size must be a multiple of accum_freq, got 8 and 3"),
    ],
)
def test_bad_settings_are_named(small: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small.config(**changes)
