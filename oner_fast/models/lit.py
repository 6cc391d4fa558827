"""A LiT-like teacher: one trained linear head on each of two frozen encoders that packages bring.

It is no CLIP. In LiT (Zhai et al., CVPR 2022) the picture tower is locked and the text tower trained; here both are
locked, as both are small and trained already, and the heads alone learn a common space from captioned pictures.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from oner_fast import format_version
from oner_fast.atomic import write_atomic
from oner_fast.models import packaged
from oner_fast.models.packaged import Encoders
from oner_fast.models.token_towers import TokenTower

CONFIG = "lit_config.json"
WEIGHTS = "lit_model.safetensors"
FORMAT = "oner_fast.lit"


@dataclass(frozen=True)
class LiTConfig:
    """Sizes of the heads, and of the pictures that they are trained on."""

    image_size: int = 48
    """Pixels a side of the pictures, a student's; they are enlarged to grid times the encoder's stride (6 x 32 px)."""
    grid: int = 6
    """Cells a side of the feature map, so tokens are grid x grid: the student's grid."""
    embed_dim: int = 256

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class LiTHeads(nn.Module):
    """What is trained: ``image`` and ``text``, two linear maps to the common space, and the logarithm of
    logit_scale."""

    def __init__(self, image_width: int, text_width: int, embed_dim: int, temperature: float = 0.07) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(image_width, embed_dim), nn.Linear(text_width, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def embed_text(self, features: Tensor) -> Tensor:
        """The sentence encoder's (B, W) -> (B, E)."""
        # The sentence encoder was trained to directions; of root mean square 1 they suit a linear map's initialisation.
        return self.text(F.normalize(features, dim=-1) * features.shape[-1] ** 0.5)


class ImageTower(nn.Module):
    """The picture encoder with its head."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S) -> (B, E): the head of the pooled feature map."""
        embeddings: Tensor = self.head(pooled_features(self.encoder(pixels)))
        return embeddings


class LiT(nn.Module):
    """Both towers, as :class:`oner_fast.models.teacher.Teacher` takes them."""

    def __init__(self, encoders: Encoders, heads: LiTHeads) -> None:
        super().__init__()
        self.visual = ImageTower(encoders.image, heads.image)
        self.text_encoder, self.heads = encoders.text, heads

    @property
    def logit_scale(self) -> Tensor:
        """Its logarithm, as in a CLIP."""
        return self.heads.logit_scale

    def encode_text(self, ids: Tensor) -> Tensor:
        """Ids (B, L) int64 -> (B, E), not normalised."""
        return self.heads.embed_text(self.text_encoder(ids))


class LiTTower(TokenTower):
    """The picture tower: its tokens are the cells of the last feature map, token 0 is their mean. As the head is
    linear, token 0 passed through it is the picture's embedding, and the mean of the other tokens."""

    interpolation = "bicubic"

    def __init__(self, visual: ImageTower, encoders: Encoders, grid: int) -> None:
        self.module: ImageTower = visual
        self.patch_size, self.mean, self.std = encoders.stride, encoders.mean, encoders.std
        self.image_size = grid * encoders.stride

    def resize(self, image_size: int) -> None:
        # A convolution takes any size.
        self.image_size = image_size

    def hidden(self, pixels: Tensor) -> Tensor:
        features = self.module.encoder(pixels)
        return torch.cat([pooled_features(features).unsqueeze(1), features.flatten(2).transpose(1, 2)], dim=1)

    def project(self, hidden: Tensor) -> Tensor:
        return self.module.head(hidden)

    def pooled(self, pixels: Tensor) -> Tensor:
        return self.module(pixels)


def pooled_features(features: Tensor) -> Tensor:
    """The mean over a feature map's cells: (B, C, g, g) -> (B, C)."""
    return features.mean(dim=(2, 3))


def build_heads(config: LiTConfig, encoders: Encoders, temperature: float = 0.07) -> LiTHeads:
    """Untrained heads that fit the encoders."""
    return LiTHeads(encoders.image_width, encoders.text_width, config.embed_dim, temperature)


def save_lit(folder: Path | str, heads: LiTHeads, config: LiTConfig, origins: dict[str, dict[str, str]]) -> None:
    """Write ``lit_config.json`` (sizes, and the encoders' packages with the SHA-256 of their weights) and
    ``lit_model.safetensors`` (the heads alone) into ``folder``. Each file is whole at any moment."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
    weights = save(tensors)
    about = {"format": FORMAT, format_version.FIELD: format_version.MODEL, "model": asdict(config), "encoders": origins}
    text = json.dumps(about, indent=2) + "\n"
    write_atomic(folder / WEIGHTS, lambda file: file.write(weights))
    write_atomic(folder / CONFIG, lambda file: file.write(text.encode()))


def load_lit(folder: Path | str) -> tuple[LiT, Encoders, LiTConfig]:
    """Read what :func:`save_lit` wrote, and the encoders from their packages (float32, evaluation mode).

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: they are not what save_lit writes, or an encoder's weights are not those that the heads were
            trained on.
        ModuleNotFoundError: a package is not installed.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; it is no finished run of 'oner-fast train lit'")
    about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    format_version.check_format_version(folder / CONFIG, about.get(format_version.FIELD), format_version.MODEL)
    config = lit_config_from_dict(about.get("model"), str(folder / CONFIG))
    encoders = packaged.packaged_encoders()
    check_origins(about.get("encoders"), encoders, str(folder))
    heads = build_heads(config, encoders)
    try:
        heads.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit the configuration beside it: {error}") from error
    return LiT(encoders, heads).eval(), encoders, config


def lit_config_from_dict(values: Any, name: str) -> LiTConfig:
    """The configuration out of JSON; ``name`` stands in the error.

    Raises:
        ValueError: it holds other fields than the sizes of a LiT.
    """
    known = {field.name for field in fields(LiTConfig)}
    if not isinstance(values, dict) or values.keys() != known:
        given = sorted(values) if isinstance(values, dict) else values
        raise ValueError(f"{name} must hold {', '.join(sorted(known))} under 'model', got {given}")
    return LiTConfig(**values)


def check_origins(saved: Any, encoders: Encoders, name: str) -> None:
    """A ValueError where ``saved`` names other weights than ``encoders`` has."""
    for side, now in encoders.origins().items():
        before = saved.get(side) if isinstance(saved, dict) else None
        if not isinstance(before, dict) or before.get("sha256") != now["sha256"]:
            raise ValueError(
                f"the heads of {name} were trained on another {side} encoder: {_described(before)}, installed is "
                f"{_described(now)}; install the former, or train the heads anew"
            )


def _described(origin: Any) -> str:
    if not isinstance(origin, dict):
        return "none named"
    return f"{origin.get('package')} {origin.get('version')} (SHA-256 {str(origin.get('sha256'))[:12]}...)"
