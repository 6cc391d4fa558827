"""Masks are keyed by (seed, step, place in the global batch): nothing else may change them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from oner_fast.models.oner import ImageInput, TextInput
from oner_fast.train.oner.inputs import StudentInput, student_input, student_passes, teacher_input
from oner_fast.train.oner.settings import Objectives

WHOLE = {"xmc": 1.0, "cic": 1.0, "force_patch_dropout": 0.25}


def made(small: Any, batch: Any, seed: int = 7, **objectives: Any) -> StudentInput:
    config = small.config(**objectives)
    return student_input(batch, config.objectives, config.model, seed, small.vocabulary)


def images_of(inputs: StudentInput) -> dict[Any, ImageInput]:
    return {each.name: each.image for each in inputs.passes if each.image is not None}


def texts_of(inputs: StudentInput) -> dict[Any, TextInput]:
    return {each.name: each.text for each in inputs.passes if each.text is not None}


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_any_split_masks_alike(small: Any, parts: int) -> None:
    """Micro-batches and ranks are both contiguous parts."""
    batch = small.batch()
    whole, split = made(small, batch, **WHOLE), [made(small, part, **WHOLE) for part in batch.split(parts)]
    for name, image in images_of(whole).items():
        for field in ("cells", "masked"):
            joined = torch.cat([getattr(images_of(part)[name], field) for part in split])
            assert torch.equal(joined, getattr(image, field)), (name, field)
    for name, text in texts_of(whole).items():
        assert torch.equal(torch.cat([texts_of(part)[name].input_ids for part in split]), text.input_ids)
    for name, words in whole.words.items():
        assert torch.equal(torch.cat([part.words[name].ids for part in split]), words.ids)
        before = torch.tensor([0, *(texts_of(part)["text"].input_ids.numel() for part in split)]).cumsum(0)
        rows = torch.cat([part.words[name].rows + begin for part, begin in zip(split, before, strict=False)])
        assert torch.equal(rows, words.rows)
    assert whole.word_count == sum(part.word_count for part in split) > 0
    assert whole.patch_count == sum(part.patch_count for part in split) == 2 * 8 * 3


def test_seed_and_step_change_the_masks(small: Any) -> None:
    batch = small.batch()
    first = images_of(made(small, batch))["image"].masked
    again = images_of(made(small, batch))["image"].masked
    other_seed = images_of(made(small, batch, seed=8))["image"].masked
    other_step = images_of(made(small, dataclasses.replace(batch, step=4)))["image"].masked
    assert torch.equal(first, again)
    assert not torch.equal(first, other_seed) and not torch.equal(first, other_step)


def test_masking_draws_from_no_generator(small: Any) -> None:
    before = torch.get_rng_state()
    made(small, small.batch(), **WHOLE)
    assert torch.equal(before, torch.get_rng_state())


def test_two_independent_maskings_of_a_pair(small: Any) -> None:
    """The student's pass of one modality and its image+text pass hide different words, patches and dropped patches."""
    inputs = made(small, small.batch(), **WHOLE)
    images, texts = images_of(inputs), texts_of(inputs)
    assert not torch.equal(images["image"].masked, images["image_text"].masked)
    assert not torch.equal(images["image"].cells, images["image_text"].cells)
    assert not torch.equal(texts["text"].input_ids, texts["image_text"].input_ids)
    # The context passes see what the passes of one modality see, and share its embedding.
    assert images["image_given_text"] is images["image"] and texts["text_given_image"] is texts["text"]


def test_hidden_words_are_the_targets(small: Any) -> None:
    batch = small.batch()
    inputs = made(small, batch)
    assert set(inputs.words) == {"text", "image_text"} and set(inputs.patches) == {"image", "image_text"}
    for name, words in inputs.words.items():
        assert torch.equal(words.ids, batch.text.input_ids[words.rows])
        changed = (texts_of(inputs)[name].input_ids != batch.text.input_ids).nonzero().squeeze(1)
        assert set(changed.tolist()) <= set(words.rows.tolist()) and len(changed) > 0
        assert torch.equal(texts_of(inputs)[name].cu_seqlens, batch.text.cu_seqlens)
    for name, masked in inputs.patches.items():
        assert masked.sum(dim=1).tolist() == [4] * 8  # half of nine
        assert masked is images_of(inputs)[name].masked


def test_the_teacher_sees_everything(small: Any) -> None:
    batch = small.batch()
    image, text = teacher_input(batch)
    assert (image.name, text.name) == ("image", "text")
    assert image.image is not None and image.image.cells is None and image.image.masked is None
    assert text.text is not None and torch.equal(text.text.input_ids, batch.text.input_ids)


@pytest.mark.parametrize(
    ("weights", "shared", "expected"),
    [
        ({}, True, "image text image_text"),
        ({"cmc": 0}, True, "image text image_text"),
        ({"cmc": 0, "mlm": 0, "mim": 0}, True, "image text"),
        ({"cmc": 0, "mlm": 0, "mim": 0, "xmc": 1}, True, "image text"),
        ({"cmc": 0, "mlm": 0, "mim": 0, "cic": 1}, True, "image text image_given_text text_given_image"),
        ({"cic": 1}, True, "image text image_text image_given_text text_given_image"),
        ({"cmc": 0}, False, "image text"),
    ],
)
def test_only_passes_that_a_weight_needs(weights: dict[str, Any], shared: bool, expected: str) -> None:
    assert student_passes(Objectives(**weights), shared) == tuple(expected.split())


def test_without_masked_losses_nothing_is_masked(small: Any) -> None:
    batch = small.batch()
    inputs = made(small, batch, mlm=0, mim=0)
    assert inputs.words == {} and inputs.patches == {} and inputs.word_count == inputs.patch_count == 0
    assert all(image.masked is None and image.cells is None for image in images_of(inputs).values())
    assert all(torch.equal(text.input_ids, batch.text.input_ids) for text in texts_of(inputs).values())


def test_patch_dropout_keeps_sorted_cells(small: Any) -> None:
    image = images_of(made(small, small.batch(), **WHOLE))["image"]
    assert image.cells is not None and image.masked is not None
    assert image.cells.shape == (8, 7) and image.masked.sum(dim=1).tolist() == [3] * 8
    assert torch.equal(image.cells, image.cells.sort(dim=1).values)
    assert all(row.unique().numel() == 7 for row in image.cells) and not torch.equal(image.cells[0], image.cells[1])


def test_moving_keeps_what_passes_share(small: Any) -> None:
    inputs = made(small, small.batch(), **WHOLE)
    moved = inputs.to(torch.device("cpu"))
    images, texts = images_of(moved), texts_of(moved)
    assert images["image_given_text"] is images["image"] and texts["text_given_image"] is texts["text"]
    assert images["image_text"] is not images["image"]
    meta = inputs.to(torch.device("meta"))
    image, hidden = images_of(meta)["image"], meta.targets["image"]
    tensors = [image.images, image.cells, image.masked, hidden.rows, hidden.cells]
    tensors += [texts_of(meta)["text"].input_ids, meta.words["text"].rows]
    assert {tensor.device.type for tensor in [*tensors, *meta.patches.values()]} == {"meta"}
