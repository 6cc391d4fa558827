"""The inputs of student and teacher in a step: the passes with their masks, and the targets of prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from oner_fast.data.batch import PairBatch
from oner_fast.data.word_masks import Vocabulary, mask_words
from oner_fast.models.oner import ImageInput, OneRConfig, Pass, PassName, TextInput, Wanted
from oner_fast.nn.embeddings import PatchEmbedding
from oner_fast.ops.patch_masks import patch_mask
from oner_fast.train.oner.settings import Objectives

Input = TypeVar("Input", ImageInput, TextInput)

# Streams of the masks: the image pass, the image+text pass, and patch dropout in each.
_IMAGE, _JOINT, _DROP_IMAGE, _DROP_JOINT = 0, 1, 2, 3


@dataclass(frozen=True)
class WordTargets:
    """Rows (M,) int64 of a pass's packed words, and the original ids (M,) int64."""

    rows: Tensor
    ids: Tensor


@dataclass(frozen=True)
class StudentInput:
    """The student's passes of a micro-batch.

    Attributes:
        passes: the forward passes to run.
        words: for each pass that predicts words, the masked words.
        patches: for each pass that predicts patches, (B, M) bool that marks the masked patches.
    """

    passes: tuple[Pass, ...]
    words: dict[PassName, WordTargets]
    patches: dict[PassName, Tensor]

    @property
    def word_count(self) -> int:
        """The number of masked words in all passes."""
        return sum(targets.rows.shape[0] for targets in self.words.values())

    @property
    def patch_count(self) -> int:
        """The number of masked patches in all passes."""
        return sum(int(masked.sum()) for masked in self.patches.values())

    def wanted(self) -> dict[PassName, Wanted]:
        """Return the outputs that a loss reads besides [CLS]: the masked words and patches."""
        found: dict[PassName, Wanted] = {}
        for name in self.words.keys() | self.patches.keys():
            rows, masked = None, self.patches.get(name)
            if masked is not None:
                places = PatchEmbedding.masked_places(masked)
                rows = (
                    places + torch.arange(len(masked), device=masked.device).unsqueeze(1) * masked.shape[1]
                ).flatten()
            found[name] = Wanted(rows, self.words[name].rows if name in self.words else None)
        return found

    def to(self, device: torch.device) -> StudentInput:
        """Move the input to another device; inputs shared by passes stay shared."""
        moved: dict[int, Any] = {}

        def move(value: Input | None) -> Input | None:
            if value is not None and id(value) not in moved:
                tensors = {name: item.to(device) for name, item in vars(value).items() if item is not None}
                moved[id(value)] = replace(value, **tensors)
            return None if value is None else moved[id(value)]

        passes = tuple(Pass(each.name, move(each.image), move(each.text)) for each in self.passes)
        words = {name: WordTargets(each.rows.to(device), each.ids.to(device)) for name, each in self.words.items()}
        patches = {name: masked.to(device) for name, masked in self.patches.items()}
        return StudentInput(passes, words, patches)


def student_passes(objectives: Objectives, shared_trunk: bool) -> tuple[PassName, ...]:
    """Return the passes that the weights ask for.

    ITC, XMC and the masked objectives of a single modality need F(I) and F(T). So do the keys where there is no
    teacher. CMC and masked multimodal modelling need F(I,T), and CIC needs F(I|T) and F(T|I).
    """
    both = bool(objectives.itc or objectives.xmc or (objectives.contrastive and not objectives.momentum_teacher))
    passes: tuple[PassName, ...] = ()
    if both or objectives.mim:
        passes += ("image",)
    if both or objectives.mlm:
        passes += ("text",)
    if shared_trunk and (objectives.cmc or objectives.mlm or objectives.mim):
        passes += ("image_text",)
    if objectives.cic:
        passes += ("image_given_text", "text_given_image")
    return passes


def student_input(
    batch: PairBatch, objectives: Objectives, model: OneRConfig, seed: int, vocabulary: Vocabulary
) -> StudentInput:
    """Mask a micro-batch on the CPU; every draw is keyed by (seed, step, place in the global batch)."""
    passes: list[Pass] = []
    words: dict[PassName, WordTargets] = {}
    patches: dict[PassName, Tensor] = {}
    images: dict[int, ImageInput] = {}
    texts: dict[int, TextInput] = {}
    for name in student_passes(objectives, model.shared_trunk):
        # The two context passes see the same masked image and caption as the passes of one modality.
        stream = _JOINT if name == "image_text" else _IMAGE
        if stream not in images:
            images[stream] = _masked_image(batch, objectives, model, seed, stream)
            texts[stream], targets = _masked_text(batch, objectives, seed, stream, vocabulary)
            if targets is not None:
                words["image_text" if stream == _JOINT else "text"] = targets
            masked = images[stream].masked
            if masked is not None:
                patches["image_text" if stream == _JOINT else "image"] = masked
        passes.append(Pass(name, *Pass(name, images[stream], texts[stream]).shown()))
    return StudentInput(tuple(passes), words, patches)


def teacher_input(batch: PairBatch) -> tuple[Pass, ...]:
    """Return the inputs of F(I) and F(T) without any mask, of the second view where the batch has one."""
    image = ImageInput(batch.images if batch.second is None else batch.second)
    return Pass("image", image=image), Pass("text", text=TextInput(batch.text.input_ids, batch.text.cu_seqlens))


def _masked_image(batch: PairBatch, objectives: Objectives, model: OneRConfig, seed: int, stream: int) -> ImageInput:
    count = (model.image_size // model.patch_size) ** 2
    cells, remaining = None, count
    if objectives.force_patch_dropout:
        dropped = int(objectives.force_patch_dropout * count)
        drop_stream = _DROP_JOINT if stream == _JOINT else _DROP_IMAGE
        drop = patch_mask(seed, batch.step, batch.samples, count, dropped, drop_stream)
        remaining = count - dropped
        cells = torch.argsort(drop.to(torch.uint8), dim=1, stable=True)[:, :remaining].contiguous()
    masked = None
    if objectives.mim and (hidden := int(objectives.mask_patch_ratio * remaining)):
        masked = patch_mask(seed, batch.step, batch.samples, remaining, hidden, stream)
    return ImageInput(batch.images, cells, masked)


def _masked_text(
    batch: PairBatch, objectives: Objectives, seed: int, stream: int, vocabulary: Vocabulary
) -> tuple[TextInput, WordTargets | None]:
    text = batch.text
    if not objectives.mlm:
        return TextInput(text.input_ids, text.cu_seqlens), None
    hidden = mask_words(text, seed, batch.step, batch.samples, stream, vocabulary, objectives.mask_word_ratio)
    rows = hidden.target.nonzero().squeeze(1)
    return TextInput(hidden.input_ids, text.cu_seqlens), WordTargets(rows, text.input_ids.index_select(0, rows))
