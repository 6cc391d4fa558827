"""Open trained models: `oner_fast.load(run or file)`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.data.batch import TokenizedText
from oner_fast.data.given_images import GivenImage, GivenImages, as_rgb
from oner_fast.data.images import eval_transform
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.loaded_towers import LoadedTowers, clip_towers, stacked, student_towers
from oner_fast.models import lit, pretrained_encoders
from oner_fast.models.clip import CONFIG, CLIPConfig, build_clip, clip_tokenizer
from oner_fast.models.files import FORMAT as ONER_FORMAT
from oner_fast.models.files import (
    UTA_FORMAT,
    config_from_dict,
    load_model,
    load_uta,
    read_metadata,
    uta_config_from_dict,
)
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.models.pretrained_encoders import Encoders
from oner_fast.models.teacher import Teacher, lit_teacher, load_teacher
from oner_fast.models.teacher_image_towers import image_tower_of
from oner_fast.models.uta import UTA
from oner_fast.train.engine import checkpoint

CLIP_FORMAT = "oner_fast.clip"


@dataclass(frozen=True)
class Loaded:
    """OneR's tower with its preprocessing and tokenizer. Embeddings are (B, E) float32, L2-normalised."""

    model: OneR
    tokenizer: Tokenizer

    @property
    def config(self) -> OneRConfig:
        """Configuration of the tower."""
        return self.model.config

    def preprocess(self, image: GivenImage, name: str = "image") -> Tensor:
        """Convert an image of any size to uint8 (3, S, S): upright, shorter side to S, centre square.

        Takes, and raises as, `oner_fast.data.given_images.as_rgb`; `name` is the image's name in an error.
        """
        return eval_transform(self.config.image_size)(as_rgb(image, name))

    @torch.inference_mode()
    def encode_image(self, images: GivenImages) -> Tensor:
        """Embed images by F(I): (B, E).

        Args:
            images: one image or a list of images, each a path, the bytes of an image file, a PIL image or a uint8 array
                (H, W, 3); an array (B, H, W, 3); or a tensor of pixels ready for the model, uint8 (B, 3, S, S).

        Raises:
            TypeError: an image has another form; the message says which.
            ValueError: there is no image, or one that cannot be decoded or is over the budget of a sample.
            OSError: a file cannot be read.
        """
        return _normalise(self.model.encode_image(self._images(images)))

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed captions by F(T): (B, E)."""
        text = self._texts(texts)
        return _normalise(self.model.encode_text(text.input_ids, text.cu_seqlens))

    @torch.inference_mode()
    def encode_image_text(self, images: GivenImages, texts: Sequence[str]) -> Tensor:
        """Embed pairs by F(I,T): (B, E). Raises ValueError where the numbers of images and texts differ."""
        pixels, text = self._images(images), self._texts(texts)
        if pixels.shape[0] != len(text):
            raise ValueError(f"each image must have one text, got {pixels.shape[0]} images and {len(text)} texts")
        return _normalise(self.model.encode_image_text(pixels, text.input_ids, text.cu_seqlens))

    @torch.inference_mode()
    def encode_patches(self, images: GivenImages) -> Tensor:
        """Project each patch output of F(I): (B, N, E), the grid row by row."""
        return _normalise(self.model.encode_patches(self._images(images)))

    def _images(self, images: GivenImages) -> Tensor:
        return stacked(images, self.preprocess).to(self._device)

    def _texts(self, texts: Sequence[str]) -> TokenizedText:
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, got one string")
        return self.tokenizer(list(texts), self.config.max_text_tokens).to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.model.cls_token.device


def load(
    source: Path | str, device: torch.device | str = "cpu", *, text_tower: str | Path | None = None
) -> Loaded | LoadedTowers:
    """Load a trained model: OneR's tower, UTA's student with its teacher's text tower, a CLIP, or a LiT.

    Args:
        source: a run folder (its `model.safetensors`, or its newest checkpoint while it trains), a `model.safetensors`,
            a checkpoint within a run folder, or a folder of open_clip (`open_clip_config.json` and weights) or of
            `oner-fast train lit` (`lit_config.json` and heads).
        device: where the model computes.
        text_tower: for UTA's student, the CLIP that embeds texts, named as in `oner_fast.models.teacher.load_teacher`;
            the one that the student was aligned to by default. It is loaded at the first text.

    Raises:
        FileNotFoundError: there is no such run or file, or the run has no model and no checkpoint yet.
        ValueError: the file is not a model of this library, or `text_tower` was given for a model that has a text
            tower.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no run folder or model file {path}")
    path = _file_of(path) if path.is_dir() else path
    if path.name == CONFIG:
        loaded: Loaded | LoadedTowers = clip_towers(load_teacher(path.parent, device=device), path.parent, device)
    elif path.name == lit.CONFIG:
        loaded = _lit(lit.load_lit(path.parent), path.parent, device)
    elif path.suffix == ".pt":
        loaded = _from_checkpoint(path, device)
    elif (about := read_metadata(path)).get("format") == UTA_FORMAT:
        loaded = student_towers(load_uta(path), about.get("teacher", ""), path.parent, device)
    else:
        loaded = _oner(*load_model(path), device)
    if text_tower is None:
        return loaded
    if not isinstance(loaded, LoadedTowers) or isinstance(loaded.model, Teacher):
        raise ValueError(f"{source} has its own text tower; only UTA's student takes another")
    return replace(loaded, text_source=str(text_tower))


def _file_of(folder: Path) -> Path:
    """Path of the trained model in a folder, or else of its newest checkpoint."""
    for name in ("model.safetensors", CONFIG, lit.CONFIG):
        if (folder / name).is_file():
            return folder / name
    if (found := checkpoint.latest(folder / "checkpoints")) is None:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor a checkpoint; train it first")
    return found


def _oner(tower: OneR, tokenizer_json: str, device: torch.device | str) -> Loaded:
    return Loaded(tower.to(device).eval().requires_grad_(False), Tokenizer.from_json(tokenizer_json))


def _lit(parts: tuple[lit.LiT, Encoders, lit.LiTConfig], run: Path, device: torch.device | str) -> LoadedTowers:
    """Wrap a LiT, whose images are first reduced to the size that its heads were trained on."""
    teacher = lit_teacher(str(run), *parts, device=device)
    return replace(clip_towers(teacher, run, device), image_size=parts[2].image_size)


def _from_checkpoint(path: Path, device: torch.device | str) -> Loaded | LoadedTowers:
    """Load the model of an unfinished run; its checkpoint names the kind of model under "kind"."""
    state = checkpoint.load(path)
    kind, student = state.get("kind", ONER_FORMAT), state.get("student", {})
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    if kind == CLIP_FORMAT:
        read = json.loads(state["model_config"]).items()
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in read}
        config = CLIPConfig(**values)
        clip = build_clip(config)
        clip.load_state_dict(part_of(student, "clip."))
        name = str(run)
        teacher = Teacher(
            image_tower_of(clip, name), name=name, model=clip, tokenize=lambda: clip_tokenizer(config), device=device
        )
        return clip_towers(teacher, run, device)
    if kind == lit.FORMAT:
        lit_config = lit.lit_config_from_dict(json.loads(state["model_config"]), str(path))
        encoders = pretrained_encoders.packaged_encoders()
        lit.check_origins(json.loads(state["encoders"]), encoders, str(path))
        heads = lit.build_heads(lit_config, encoders)
        heads.load_state_dict(part_of(student, "heads."))
        return _lit((lit.LiT(encoders, heads).eval(), encoders, lit_config), run, device)
    if kind == UTA_FORMAT:
        uta = UTA(uta_config_from_dict(json.loads(state["model_config"])))
        uta.load_state_dict(part_of(student, "student.") or student)
        return student_towers(uta, state.get("teacher", ""), run, device)
    if "model_config" not in state:
        raise ValueError(f"{path} is not a checkpoint of a tower: it holds {', '.join(sorted(state))}")
    tower = OneR(config_from_dict(json.loads(state["model_config"])))
    tower.load_state_dict(tower_of(student))
    return _oner(tower, state["tokenizer"], device)


def tower_of(student: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries of a student's state that belong to the tower."""
    return part_of(student, "tower.")


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries of `state` under a prefix, without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _normalise(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.float(), dim=-1)
