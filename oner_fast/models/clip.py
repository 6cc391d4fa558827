"""A two-tower CLIP to train. It has open_clip's architecture, so that open_clip loads its checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oner_fast import bounded_json
from oner_fast.atomic import write_atomic
from oner_fast.models.fitting import Found, check_fit, filled
from oner_fast.models.optional_packages import optional_package
from oner_fast.models.safetensors_header import read_header
from oner_fast.models.settings import from_dict
from oner_fast.models.state_files import read_safetensors, unwrapped

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
MAX_LOGIT_SCALE = 100.0
MAX_CONTEXT = 4096
"""Greatest context length that is loaded; the text tower's mask takes its square."""


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the two towers; the defaults are open_clip's ViT-B-16."""

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    text_width: int = 512
    text_layers: int = 12
    text_heads: int = 8
    context_length: int = 77
    """Tokens of a text, with its start and its end; longer texts are cut."""
    vocab_size: int = 49408
    """Size of CLIP's byte-pair vocabulary, which open_clip's tokenizer brings."""
    embed_dim: int = 512
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.image_size} and {self.patch_size}"
            )
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width must be a multiple of {tower}_heads, got {width} and {heads}")

    @property
    def grid(self) -> int:
        """Number of patches along a side of the image."""
        return self.image_size // self.patch_size


def open_clip_config(config: CLIPConfig) -> dict[str, Any]:
    """Content of open_clip's `open_clip_config.json` for this configuration: `model_cfg` and `preprocess_cfg`."""
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "vision_cfg": {
                "image_size": config.image_size,
                "patch_size": config.patch_size,
                "width": config.vision_width,
                "layers": config.vision_layers,
                "head_width": config.vision_width // config.vision_heads,
            },
            "text_cfg": {
                "context_length": config.context_length,
                "vocab_size": config.vocab_size,
                "width": config.text_width,
                "heads": config.text_heads,
                "layers": config.text_layers,
            },
        },
        "preprocess_cfg": {
            "size": config.image_size,
            "mean": list(config.image_mean),
            "std": list(config.image_std),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def build_clip(config: CLIPConfig) -> nn.Module:
    """Build an `open_clip.CLIP` with random weights (from torch's generator), in training mode.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
    """
    open_clip = optional_package("open_clip")
    values = open_clip_config(config)
    model = open_clip.CLIP(**values["model_cfg"])
    open_clip.model.set_model_preprocess_cfg(model, values["preprocess_cfg"])
    return model


def check_images(images: Tensor, config: CLIPConfig) -> None:
    """Raise ValueError where `images` is not (B, 3, image_size, image_size)."""
    size = config.image_size
    if images.dim() != 4 or images.shape[1:] != (3, size, size):
        raise ValueError(f"images must have shape (B, 3, {size}, {size}), got {tuple(images.shape)}")


def clip_pixels(images: Tensor, config: CLIPConfig) -> Tensor:
    """Normalise images for the image tower: (B, 3, S, S) uint8, or floats in [0, 1], to float32.

    Raises:
        ValueError: the shape is not (B, 3, image_size, image_size).
    """
    check_images(images, config)
    top = 255.0 if images.dtype == torch.uint8 else 1.0
    mean = torch.tensor(config.image_mean, device=images.device).view(3, 1, 1) * top
    std = torch.tensor(config.image_std, device=images.device).view(3, 1, 1) * top
    return (images.float() - mean) / std


def clip_tokenizer(config: CLIPConfig) -> Any:
    """Make CLIP's byte-pair tokenizer: list of strings -> (B, context_length) int64."""
    return optional_package("open_clip").SimpleTokenizer(context_length=config.context_length)


def save_clip(folder: Path | str, model: nn.Module, config: CLIPConfig) -> None:
    """Write `open_clip_config.json` and `open_clip_model.safetensors` into `folder`.

    open_clip loads them as `open_clip.create_model_and_transforms("local-dir:FOLDER")`. Each file is replaced at once.
    """
    from safetensors.torch import save  # here, so that a model runs where torch alone is installed

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    weights, text = save(tensors), json.dumps(open_clip_config(config), indent=2) + "\n"
    write_atomic(folder / WEIGHTS, lambda file: file.write(weights))
    write_atomic(folder / CONFIG, lambda file: file.write(text.encode()))


def load_clip(folder: Path | str) -> tuple[nn.Module, CLIPConfig]:
    """Read the files of `save_clip`: the model (float32, evaluation mode) and its sizes.

    Raises:
        FileNotFoundError: the folder lacks one of the two files.
        ValueError: `CLIPConfig` does not describe the configuration's model, or the weights do not fit it.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; it is not a finished run of 'oner-fast train clip'")
    path = folder / CONFIG
    config = _config(bounded_json.load_object(path.read_bytes(), str(path), max_bytes=2**20), path)
    problem = f"{folder / WEIGHTS} does not fit the configuration beside it"
    check_clip(Found.in_header(read_header(folder / WEIGHTS)), config, problem)
    state = unwrapped(read_safetensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return filled(build_clip(config), state, problem), config


def check_clip(found: Found, config: CLIPConfig, problem: str) -> None:
    """Raise ValueError, which starts with `problem`, unless the weights are those of a CLIP of this size."""
    if config.context_length > MAX_CONTEXT:
        raise ValueError(f"{problem}: context_length is {config.context_length:,}, and at most {MAX_CONTEXT:,} is read")
    one = replace(config, vision_layers=1, text_layers=1)
    depth = {"visual.transformer.res": config.vision_layers, "transformer.res": config.text_layers}
    check_fit(found, lambda: build_clip(one), depth.__getitem__, problem)


def clip_config_from_dict(values: dict[str, Any], name: str) -> CLIPConfig:
    """Make a configuration from JSON values; ValueError, which starts with `name`, for an unknown key or value."""
    return from_dict(CLIPConfig, values, name)


def _config(values: dict[str, Any], path: Path) -> CLIPConfig:
    try:
        model, preprocess = values["model_cfg"], values["preprocess_cfg"]
        vision, text = model["vision_cfg"], model["text_cfg"]
        sizes = {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "vision_width": vision["width"],
            "vision_layers": vision["layers"],
            "vision_heads": vision["width"] // vision["head_width"],
            "text_width": text["width"],
            "text_layers": text["layers"],
            "text_heads": text["heads"],
            "context_length": text["context_length"],
            "vocab_size": text["vocab_size"],
            "embed_dim": model["embed_dim"],
            "image_mean": preprocess["mean"],
            "image_std": preprocess["std"],
        }
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}, which a two-tower CLIP of this library needs") from error
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not the configuration of a two-tower CLIP of this library: {error}") from error
    config = clip_config_from_dict(sizes, str(path))
    if open_clip_config(config)["model_cfg"] != model:
        known = ", ".join(field.name for field in fields(CLIPConfig))
        raise ValueError(f"{path} holds settings that a two-tower CLIP of this library lacks: {known}")
    return config
