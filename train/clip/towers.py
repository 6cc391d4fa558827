"""The two towers of a contrastive training.

They are a CLIP of open_clip's architecture, or an aligned student and a frozen text tower (UTA's second stage).
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oner_fast.data.batch import TokenizedText
from oner_fast.models.clip import MAX_LOGIT_SCALE, CLIPConfig, build_clip, clip_tokenizer, save_clip
from oner_fast.models.clip_packed import encode_image, encode_text, pack_tokens
from oner_fast.models.files import SCALE, load_uta, save_uta
from oner_fast.models.teacher import load_teacher
from oner_fast.models.uta import UTA
from oner_fast.train.clip.inputs import Reader, Texts
from oner_fast.train.clip.settings import CLIPConfiguration
from oner_fast.train.clip.starting_weights import starting_clip


class Embeddings(NamedTuple):
    """Image and text embeddings (B, E), not normalised, and logit_scale (0-d)."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor


class TwoTowers(nn.Module, ABC):
    """Two towers: `forward(images, texts)` takes uint8 images (B, 3, S, S) and what `read` returns."""

    @abstractmethod
    def read(self, captions: list[str]) -> Texts:
        """Prepare captions for the text tower; the result is on the CPU or on that tower's device."""

    def reader(self) -> Reader | None:
        """Return a form of `read` that needs no tower, for the loader's workers; None where there is none."""
        return None

    @property
    @abstractmethod
    def log_logit_scale(self) -> nn.Parameter:
        """The logarithm of logit_scale."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the trained model into the run's folder."""

    @abstractmethod
    def about(self) -> dict[str, str]:
        """Describe the model for a checkpoint, so that `oner_fast.load` opens a run that is still training.

        Returns:
            Its `kind`, its `model_config` as JSON, and a student's `teacher`.
        """

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Keep logit_scale at 100 at most, as CLIP does; call it after the optimiser's step."""
        self.log_logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


@dataclass(frozen=True)
class PackedCaptions:
    """Tokenise captions as CLIP does, and pack them without padding."""

    tokenizer: Any
    """list of strings -> (B, context_length) int64"""

    def __call__(self, captions: list[str]) -> TokenizedText:
        """Return packed token ids."""
        return pack_tokens(self.tokenizer(captions))


class NewTowers(TwoTowers):
    """A CLIP of open_clip, from scratch or with given weights, which hold a temperature too."""

    clip: Any

    def __init__(self, config: CLIPConfig, temperature: float, weights: Path | None = None) -> None:
        super().__init__()
        self.config = config
        if weights is None:
            self.clip = build_clip(config)
            with torch.no_grad():
                self.log_logit_scale.fill_(math.log(1 / temperature))
        else:
            self.clip = starting_clip(weights, config)
        self._reader = PackedCaptions(clip_tokenizer(config))

    @property
    def log_logit_scale(self) -> nn.Parameter:
        parameter: nn.Parameter = self.clip.logit_scale
        return parameter

    def read(self, captions: list[str]) -> TokenizedText:
        """Return packed token ids."""
        return self._reader(captions)

    def reader(self) -> Reader:
        """Return the tokenizer alone."""
        return self._reader

    def forward(self, images: Tensor, texts: TokenizedText) -> Embeddings:
        """Embed uint8 images (B, 3, S, S) and packed token ids."""
        image = encode_image(self.clip, images, self.config)
        return Embeddings(image, encode_text(self.clip, texts), self.log_logit_scale.exp())

    def about(self) -> dict[str, str]:
        """Describe a CLIP."""
        return {"kind": "oner_fast.clip", "model_config": json.dumps(asdict(self.config))}

    def save(self, folder: Path) -> None:
        """Write the CLIP in open_clip's own form."""
        save_clip(folder, self.clip, self.config)


class AlignedTowers(TwoTowers):
    """A student of UTA, and the text tower of its teacher."""

    def __init__(self, init_image: str, init_text: str, lock_image: bool, device: torch.device) -> None:
        super().__init__()
        path = Path(init_image)
        path = path / "model.safetensors" if path.is_dir() else path
        self.student = load_uta(path).train()
        self.student.requires_grad_(not lock_image)
        teacher = load_teacher(init_text, device=device)
        if teacher.embed_dim != self.student.config.embed_dim:
            raise ValueError(
                f"{init_text} embeds texts in {teacher.embed_dim} numbers, the student of {init_image} images in "
                f"{self.student.config.embed_dim}"
            )
        self._encode_text = teacher.encode_text
        self._about = {"teacher": init_text, "teacher_fingerprint": teacher.fingerprint}
        self.scale = nn.Parameter(torch.tensor(math.log(teacher.logit_scale)))

    @property
    def log_logit_scale(self) -> nn.Parameter:
        return self.scale

    @property
    def image_tower(self) -> UTA:
        """The student."""
        return self.student

    def read(self, captions: list[str]) -> Tensor:
        """Return embeddings (B, E): the text tower takes no gradient."""
        return self._encode_text(captions).float()

    def forward(self, images: Tensor, texts: Tensor) -> Embeddings:
        """Embed uint8 images (B, 3, S, S); `texts` (B, E) are embeddings already."""
        return Embeddings(self.student.encode_image(images), texts, self.scale.exp())

    def about(self) -> dict[str, str]:
        """Describe a student."""
        return {"kind": "oner_fast.uta", "model_config": json.dumps(asdict(self.student.config)), **self._about}

    def save(self, folder: Path) -> None:
        """Write the student in the form in which its first stage writes it."""
        scale = {SCALE: repr(float(self.log_logit_scale))}
        save_uta(folder / "model.safetensors", self.student, self._about | scale)


def build_towers(config: CLIPConfiguration, device: torch.device, weights: Path | None = None) -> TwoTowers:
    """Build the towers that `config` asks for.

    Raises:
        FileNotFoundError: a tower to start from is not there.
        ValueError: the two towers do not fit.
    """
    c = config.contrast
    if not c.init_image:
        return NewTowers(config.model, c.temperature, weights)
    if weights is not None:
        raise ValueError("give either --init-from (a CLIP) or --init-image with --init-text (UTA's second stage)")
    towers = AlignedTowers(c.init_image, c.init_text, c.lock_image, device)
    side = towers.image_tower.config.image_size
    if side != config.model.image_size:
        raise ValueError(f"the student of {c.init_image} takes {side} px: give --image-size {side}")
    return towers
