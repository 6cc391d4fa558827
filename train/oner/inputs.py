"""The inputs of student and teacher in a step: the passes with their masks, and the targets of prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oner_fast.data.batch import PairBatch, TokenizedText
from oner_fast.data.one_buffer import with_tensors
from oner_fast.data.word_masks import Vocabulary, mask_words
from oner_fast.models.oner import ImageInput, OneRConfig, Pass, PassName, TextInput, Wanted
from oner_fast.nn.embeddings import PatchEmbedding
from oner_fast.ops.patch_masks import patch_mask
from oner_fast.train.oner.settings import Objectives, OneRConfiguration

# Streams of the masks: the image pass, the image+text pass, and patch dropout in each.
_IMAGE, _JOINT, _DROP_IMAGE, _DROP_JOINT = 0, 1, 2, 3


@dataclass(frozen=True)
class WordTargets:
    """Rows (M,) int64 of a pass's packed words, and the original ids (M,) int64."""

    rows: Tensor
    ids: Tensor


@dataclass(frozen=True)
class PatchTargets:
    """Rows (B H,) int64 of a pass's B M patches that are masked, H an image, and their cells of the image (B, H)."""

    rows: Tensor
    cells: Tensor


@dataclass(frozen=True)
class StudentInput:
    """The student's passes of a micro-batch.

    Attributes:
        passes: the forward passes to run.
        words: for each pass that predicts words, the masked words.
        patches: for each pass that predicts patches, (B, M) bool that marks the masked patches.
        targets: for each pass that predicts patches, where the masked ones are.
    """

    passes: tuple[Pass, ...]
    words: dict[PassName, WordTargets]
    patches: dict[PassName, Tensor]
    targets: dict[PassName, PatchTargets]

    @property
    def word_count(self) -> int:
        """The number of masked words in all passes."""
        return sum(targets.rows.shape[0] for targets in self.words.values())

    @property
    def patch_count(self) -> int:
        """The number of masked patches in all passes."""
        return sum(targets.rows.shape[0] for targets in self.targets.values())

    def wanted(self) -> dict[PassName, Wanted]:
        """Return the outputs that a loss reads besides [CLS]: the masked words and patches."""
        return {
            name: Wanted(
                self.targets[name].rows if name in self.targets else None,
                self.words[name].rows if name in self.words else None,
            )
            for name in self.words.keys() | self.targets.keys()
        }

    def to(self, device: torch.device) -> StudentInput:
        """Move the input to another device, tensor by tensor; inputs shared by passes stay shared."""
        return with_tensors(self, lambda tensor: tensor.to(device))


@dataclass(frozen=True)
class StepInput:
    """All that a step computes on.

    Attributes:
        student: the micro-batches, masked.
        teacher: the micro-batches as the teacher sees them, unmasked; empty where there is none.
        counts: (2,) int64, how many words and how many patches of this rank are masked, in all passes.
    """

    student: tuple[StudentInput, ...]
    teacher: tuple[tuple[Pass, ...], ...]
    counts: Tensor


@dataclass(frozen=True)
class StepInputs:
    """Make the `StepInput` of a batch on the CPU, in the loader's workers: a step then draws and counts nothing.

    Every draw is keyed by (seed, step, place in the global batch), so that it makes no difference where it is drawn.
    """

    config: OneRConfiguration
    vocabulary: Vocabulary

    def __call__(self, batch: PairBatch) -> StepInput:
        """Split the batch into micro-batches and mask them."""
        c = self.config
        parts = batch.split(c.optim.accum_freq)
        student = tuple(student_input(part, c.objectives, c.model, c.run.seed, self.vocabulary) for part in parts)
        with_teacher = c.objectives.momentum_teacher and c.objectives.contrastive
        counts = [sum(part.word_count for part in student), sum(part.patch_count for part in student)]
        return StepInput(
            student, tuple(teacher_input(part) for part in parts) if with_teacher else (), torch.tensor(counts)
        )


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
    hidden: dict[PassName, PatchTargets] = {}
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
                pass_name: PassName = "image_text" if stream == _JOINT else "image"
                patches[pass_name], hidden[pass_name] = masked, _hidden(images[stream], masked)
        passes.append(Pass(name, *Pass(name, images[stream], texts[stream]).shown()))
    return StudentInput(tuple(passes), words, patches, hidden)


def teacher_input(batch: PairBatch) -> tuple[Pass, ...]:
    """Return the inputs of F(I) and F(T) without any mask, of the second view where the batch has one."""
    image = ImageInput(batch.images if batch.second is None else batch.second)
    return Pass("image", image=image), Pass("text", text=_text_input(batch.text, batch.text.input_ids))


def _masked_image(batch: PairBatch, objectives: Objectives, model: OneRConfig, seed: int, stream: int) -> ImageInput:
    count = (model.image_size // model.patch_size) ** 2
    cells, remaining = None, count
    if objectives.force_patch_dropout:
        dropped = int(objectives.force_patch_dropout * count)
        drop_stream = _DROP_JOINT if stream == _JOINT else _DROP_IMAGE
        drop = patch_mask(seed, batch.step, batch.samples, count, dropped, drop_stream)
        remaining = count - dropped
        cells = torch.argsort(drop.to(torch.uint8), dim=1, stable=True)[:, :remaining].contiguous()
    masked, hidden = None, int(objectives.mask_patch_ratio * remaining)
    if objectives.mim and hidden:
        masked = patch_mask(seed, batch.step, batch.samples, remaining, hidden, stream)
    return ImageInput(batch.images, cells, masked, None if masked is None else hidden)


def _hidden(image: ImageInput, masked: Tensor) -> PatchTargets:
    places = PatchEmbedding.masked_places(masked)  # [B, H]
    rows = (places + torch.arange(len(masked)).unsqueeze(1) * masked.shape[1]).flatten()
    return PatchTargets(rows, places if image.cells is None else image.cells.gather(1, places))


def _text_input(text: TokenizedText, input_ids: Tensor) -> TextInput:
    return TextInput(input_ids, text.cu_seqlens, text.measured().longest)


def _masked_text(
    batch: PairBatch, objectives: Objectives, seed: int, stream: int, vocabulary: Vocabulary
) -> tuple[TextInput, WordTargets | None]:
    text = batch.text
    if not objectives.mlm:
        return _text_input(text, text.input_ids), None
    hidden = mask_words(text, seed, batch.step, batch.samples, stream, vocabulary, objectives.mask_word_ratio)
    rows = hidden.target.nonzero().squeeze(1)
    return _text_input(text, hidden.input_ids), WordTargets(rows, text.input_ids.index_select(0, rows))
