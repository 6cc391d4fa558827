"""Trained models ready to use: ``oner_fast.load(run or file)``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from oner_fast.data.batch import TokenizedText
from oner_fast.data.images import eval_transform, to_rgb
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.models.files import config_from_dict, load_model
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.train import checkpoint

Images = Tensor | Sequence[Image.Image]


@dataclass(frozen=True)
class Loaded:
    """A tower with its preprocessing and tokenizer. Embeddings are (B, E) float32, L2-normalised."""

    model: OneR
    tokenizer: Tokenizer

    @property
    def config(self) -> OneRConfig:
        """The tower's sizes."""
        return self.model.config

    def preprocess(self, image: Image.Image) -> Tensor:
        """A picture of any size and mode as uint8 (3, S, S): shorter side to S, centre square."""
        return eval_transform(self.config.image_size)(to_rgb(image))

    @torch.inference_mode()
    def encode_image(self, images: Images) -> Tensor:
        """F(I) of pictures, or of uint8 (B, 3, S, S); (B, E)."""
        return _normalise(self.model.encode_image(self._images(images)))

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """F(T) of captions; (B, E)."""
        text = self._texts(texts)
        return _normalise(self.model.encode_text(text.input_ids, text.cu_seqlens))

    @torch.inference_mode()
    def encode_image_text(self, images: Images, texts: Sequence[str]) -> Tensor:
        """F(I,T) of pairs; (B, E). ValueError where there are not as many texts as images."""
        pixels, text = self._images(images), self._texts(texts)
        if pixels.shape[0] != len(text):
            raise ValueError(f"there must be one text an image, got {pixels.shape[0]} images and {len(text)} texts")
        return _normalise(self.model.encode_image_text(pixels, text.input_ids, text.cu_seqlens))

    @torch.inference_mode()
    def encode_patches(self, images: Images) -> Tensor:
        """Every patch output of F(I) through the projection head: (B, N, E), the grid row by row."""
        return _normalise(self.model.encode_patches(self._images(images)))

    def _images(self, images: Images) -> Tensor:
        if isinstance(images, Image.Image):
            raise TypeError("images must be a list of pictures or a tensor, got one picture")
        if len(images) == 0:
            raise ValueError("images must hold at least one picture, got none")
        pixels = images if isinstance(images, Tensor) else torch.stack([self.preprocess(image) for image in images])
        return pixels.to(self._device)

    def _texts(self, texts: Sequence[str]) -> TokenizedText:
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, got one string")
        return self.tokenizer(list(texts), self.config.max_text_tokens).to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.model.cls_token.device


def load(source: Path | str, device: torch.device | str = "cpu") -> Loaded:
    """Load a trained model.

    Args:
        source: a run folder (its ``model.safetensors``, or its newest checkpoint while it trains), a
            ``model.safetensors``, or a checkpoint within a run folder.
        device: where the model computes.

    Raises:
        FileNotFoundError: there is no such run or file, or the run has no model and no checkpoint yet.
        ValueError: the file is not a model of this library.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no run folder or model file {path}")
    if path.is_dir():
        model = path / "model.safetensors"
        found = model if model.is_file() else checkpoint.latest(path / "checkpoints")
        if found is None:
            raise FileNotFoundError(f"{path} holds neither model.safetensors nor a checkpoint; train it first")
        path = found
    tower, tokenizer_json = _from_checkpoint(path) if path.suffix == ".pt" else load_model(path)
    return Loaded(tower.to(device).eval().requires_grad_(False), Tokenizer.from_json(tokenizer_json))


def _from_checkpoint(path: Path) -> tuple[OneR, str]:
    state = checkpoint.load(path)
    if "model_config" not in state:
        raise ValueError(f"{path} is not a checkpoint of a tower: it holds {', '.join(sorted(state))}")
    tower = OneR(config_from_dict(json.loads(state["model_config"])))
    tower.load_state_dict(tower_of(state["student"]))
    return tower, state["tokenizer"]


def tower_of(student: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower's part of a student's state."""
    return {name.removeprefix("tower."): tensor for name, tensor in student.items() if name.startswith("tower.")}


def _normalise(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.float(), dim=-1)
