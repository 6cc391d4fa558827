"""An image tower and a text tower, ready to use: a CLIP, or UTA's student with its teacher's text tower."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from oner_fast.data.batch import TokenizedText
from oner_fast.loaded_model import LoadedModel, check_image_size
from oner_fast.models.teacher import Teacher, is_fetched, is_teacher, load_teacher
from oner_fast.models.uta import UTA
from oner_fast.preprocess import Preprocess
from oner_fast.text_ids import GivenTexts, TextTokenizer, text_list


class LoadedTowers(LoadedModel):
    """Two towers with a common space: a CLIP, or a student with the text tower that it was aligned to.

    Attributes:
        model: the image tower, or a whole CLIP.
        image_size: pixels a side that `preprocess` gives.
        text_source: source of the text tower, which is loaded at its first use (see
            `oner_fast.models.teacher.load_teacher`); empty where there is none.
        may_fetch: whether that source was asked for by the caller and may be downloaded. A source that the model's file
            names is taken only where it lies on this machine.
        beside: the model's folder; a relative path in `text_source` may start there too.
    """

    model: UTA | Teacher

    def __init__(
        self,
        model: UTA | Teacher,
        image_size: int,
        text_source: str,
        beside: Path,
        device: torch.device | None = None,
        may_fetch: bool = False,
        *,
        log_logit_scale: float | None = None,
    ) -> None:
        """Wrap the towers, moved to `device` where one is given; `log_logit_scale` is a student's own, if any."""
        super().__init__(model if device is None else model.to(device))
        self.image_size, self.text_source, self.beside, self.may_fetch = image_size, text_source, beside, may_fetch
        self._own_scale = log_logit_scale
        self._text_tower: Teacher | None = None

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower."""
        return self.model.has_text if isinstance(self.model, Teacher) else bool(self.text_source)

    @property
    def preprocess(self) -> Preprocess:
        """Conversion of an image of any form and size to uint8 (3, S, S), called as `preprocess(image)`."""
        if isinstance(self.model, Teacher):
            return Preprocess(self.image_size, self.model.squash, self.model.interpolation == "bilinear")
        return Preprocess(self.image_size)

    @property
    def tokenize(self) -> TextTokenizer:
        """Tokenizer of the text tower: its call gives ids (B, context_length) for `encode_text`."""
        return self.text.text_tokenizer

    @property
    def logit_bias(self) -> Tensor | None:
        """Number added to the scaled cosines (SigLIP): 0-d float32, or None."""
        bias = self.model.logit_bias if isinstance(self.model, Teacher) else None
        return None if bias is None else torch.tensor(bias, device=self.device)

    @property
    def text(self) -> Teacher:
        """The text tower, with the rest of its CLIP; a student's is loaded at its first use."""
        if isinstance(self.model, Teacher):
            return self.model
        if self._text_tower is None:
            self._text_tower = self._loaded_text(self.model.config.embed_dim)
        return self._text_tower

    def _loaded_text(self, embed_dim: int) -> Teacher:
        if not self.text_source:
            raise ValueError("the student's file names no text tower; give one: oner_fast.load(..., text_tower=...)")
        places = (Path(self.text_source), self.beside / self.text_source)
        source = next((str(place) for place in places if is_teacher(place)), self.text_source)
        if not self.may_fetch and is_fetched(source):
            raise ValueError(
                f"the student's file names the text tower {source[:200]!r}, which may have to be fetched; ask for it: "
                f"oner_fast.load(..., text_tower={source[:200]!r}), or --text-tower {source[:200]}"
            )
        try:
            tower = load_teacher(source, device=self.device, tokens=False)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"the text tower {self.text_source!r} cannot be loaded: {error}; name another") from error
        if tower.embed_dim != embed_dim:
            raise ValueError(
                f"the text tower {self.text_source!r} embeds in {tower.embed_dim} numbers, the student in "
                f"{embed_dim}; name the CLIP that it was aligned to"
            )
        return tower

    def _log_logit_scale(self) -> float:
        if self._own_scale is not None:
            return self._own_scale
        return math.log(self.text.logit_scale) if self.has_text else 0.0

    def _check_image_size(self, image_size: int | None) -> None:
        if isinstance(self.model, UTA):
            check_image_size(image_size, self.model.config.patch_size)
        elif image_size not in (None, self.image_size):
            raise ValueError(f"this CLIP embeds images of {self.image_size} px alone, got image_size {image_size}")

    def _embed_images(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _embed_texts(self, texts: GivenTexts) -> Tensor:
        if isinstance(texts, TokenizedText):
            raise TypeError("packed ids are OneR's alone; give strings, or ids (B, L) from this model's tokenize")
        return self.text.encode_text(texts if isinstance(texts, Tensor) else text_list(texts))

    def _embed_patches(self, pixels: Tensor) -> Tensor:
        if isinstance(self.model, UTA):
            return self.model.encode_patches(pixels)
        return self.model.tokens(pixels)[:, 1:]


def student_towers(
    student: UTA, teacher: str, beside: Path, device: torch.device | str, log_logit_scale: float | None = None
) -> LoadedTowers:
    """Combine UTA's student with the text tower of the model `teacher`, or with none where `teacher` is empty."""
    return LoadedTowers(student.to(device), student.config.image_size, teacher, beside, log_logit_scale=log_logit_scale)


def clip_towers(clip: Teacher, beside: Path) -> LoadedTowers:
    """Combine the two towers of a CLIP."""
    return LoadedTowers(clip, clip.image_size, clip.name, beside)
