"""A LiT-like teacher: one trained linear head on each of two frozen encoders, which come from PyPI packages.

It is not a CLIP. In LiT (Zhai et al., CVPR 2022) the image tower is locked and the text tower is trained. Here both are
locked, as both are small and pretrained, and only the heads learn a common space from captioned images.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from oner_fast import bounded_json, format_version
from oner_fast.atomic import write_atomic
from oner_fast.models import pretrained_encoders
from oner_fast.models.fitting import Found, check_shapes, filled
from oner_fast.models.pretrained_encoders import Encoders
from oner_fast.models.safetensors_header import read_header
from oner_fast.models.settings import from_dict
from oner_fast.models.state_files import read_safetensors, unwrapped
from oner_fast.models.teacher_image_towers import TeacherImageTower

CONFIG = "lit_config.json"
WEIGHTS = "lit_model.safetensors"
FORMAT = "oner_fast.lit"
MAX_GRID = 64
"""Greatest grid that is loaded: 2,048 pixels a side."""


@dataclass(frozen=True)
class LiTConfig:
    """Sizes of the heads, and of the images that they are trained on."""

    image_size: int = 48
    """Side of the student's images in pixels; they are enlarged to grid times the encoder's stride (6 x 32 px)."""
    grid: int = 6
    """Number of cells along a side of the feature map, which gives grid x grid tokens; the student's grid."""
    embed_dim: int = 256

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class LiTHeads(nn.Module):
    """The trained part: `image` and `text`, linear maps to the common space, and the logarithm of logit_scale."""

    def __init__(self, image_width: int, text_width: int, embed_dim: int, temperature: float = 0.07) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(image_width, embed_dim), nn.Linear(text_width, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def embed_text(self, features: Tensor) -> Tensor:
        """Project the sentence encoder's features (B, W) to (B, E)."""
        # The sentence encoder gives directions; at root mean square 1 they suit the initialisation of a linear map.
        return self.text(F.normalize(features, dim=-1) * features.shape[-1] ** 0.5)


class ImageTower(nn.Module):
    """The image encoder with its head."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed normalised pixels (B, 3, S, S): the head applied to the pooled feature map, (B, E)."""
        embeddings: Tensor = self.head(pooled_features(self.encoder(pixels)))
        return embeddings


class LiT(nn.Module):
    """Both towers, in the form that `oner_fast.models.teacher.Teacher` takes."""

    def __init__(self, encoders: Encoders, heads: LiTHeads) -> None:
        super().__init__()
        self.visual = ImageTower(encoders.image, heads.image)
        self.text_encoder, self.heads = encoders.text, heads

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the scale, as in a CLIP."""
        return self.heads.logit_scale

    def encode_text(self, ids: Tensor) -> Tensor:
        """Embed ids (B, L) int64: (B, E), not normalised."""
        return self.heads.embed_text(self.text_encoder(ids))


class LiTTower(TeacherImageTower):
    """The image tower, whose tokens are the cells of the last feature map and, as token 0, their mean.

    The head is linear, so token 0 passed through it is both the image's embedding and the mean of the other tokens.
    """

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
    """Average a feature map over its cells: (B, C, g, g) -> (B, C)."""
    return features.mean(dim=(2, 3))


def build_heads(config: LiTConfig, encoders: Encoders, temperature: float = 0.07) -> LiTHeads:
    """Build untrained heads that fit the encoders."""
    return LiTHeads(encoders.image_width, encoders.text_width, config.embed_dim, temperature)


def save_lit(folder: Path | str, heads: LiTHeads, config: LiTConfig, origins: dict[str, dict[str, str]]) -> None:
    """Write `lit_config.json` and `lit_model.safetensors` into `folder`; each file is replaced at once.

    The first holds the sizes and the encoders' packages with the SHA-256 of their weights, the second the heads alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.state_dict().items()}
    weights = save(tensors)
    about = {"format": FORMAT, format_version.FIELD: format_version.MODEL, "model": asdict(config), "encoders": origins}
    text = json.dumps(about, indent=2) + "\n"
    write_atomic(folder / WEIGHTS, lambda file: file.write(weights))
    write_atomic(folder / CONFIG, lambda file: file.write(text.encode()))


def load_lit(folder: Path | str) -> tuple[LiT, Encoders, LiTConfig]:
    """Read the files of `save_lit`, and the encoders from their packages (float32, evaluation mode).

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: the files are not those of `save_lit`, or the heads were trained on other weights of an encoder.
        ModuleNotFoundError: a package is not installed.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; it is not a finished run of 'oner-fast train lit'")
    about = bounded_json.load_object((folder / CONFIG).read_bytes(), str(folder / CONFIG), max_bytes=2**20)
    format_version.check_format_version(folder / CONFIG, about.get(format_version.FIELD), format_version.MODEL)
    config = lit_config_from_dict(about.get("model"), str(folder / CONFIG))
    encoders = pretrained_encoders.packaged_encoders()
    check_origins(about.get("encoders"), encoders, str(folder))
    problem = f"{folder / WEIGHTS} does not fit the configuration beside it"
    check_lit(Found.in_header(read_header(folder / WEIGHTS)), config, encoders, problem)
    state = unwrapped(read_safetensors(folder / WEIGHTS), str(folder / WEIGHTS))
    heads = filled(build_heads(config, encoders), state, problem)
    return LiT(encoders, heads).eval(), encoders, config


def check_lit(found: Found, config: LiTConfig, encoders: Encoders, problem: str) -> None:
    """Raise ValueError, which starts with `problem`, unless the weights are those of heads of this size."""
    size, widths = config.embed_dim, {"image": encoders.image_width, "text": encoders.text_width}
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()}
    for side, width in widths.items():
        shapes |= {f"{side}.weight": (size, width), f"{side}.bias": (size,)}
    check_shapes(found, shapes, problem)
    if config.grid > MAX_GRID:
        raise ValueError(f"{problem}: grid is {config.grid:,}, and at most {MAX_GRID} is read")


def lit_config_from_dict(values: Any, name: str) -> LiTConfig:
    """Make the configuration from JSON values; an error names `name`.

    Raises:
        ValueError: the fields are not the sizes of a LiT.
    """
    known = {field.name for field in fields(LiTConfig)}
    if not isinstance(values, dict) or values.keys() != known:
        given = sorted(values) if isinstance(values, dict) else values
        raise ValueError(f"{name} must hold {', '.join(sorted(known))} under 'model', got {given}")
    return from_dict(LiTConfig, values, name)


def check_origins(saved: Any, encoders: Encoders, name: str) -> None:
    """Raise ValueError where `saved` names other weights than those of `encoders`."""
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
