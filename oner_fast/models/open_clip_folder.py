"""A folder that open_clip saved: checked before open_clip builds what its configuration describes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from oner_fast import bounded_json
from oner_fast.models import weights
from oner_fast.models.optional_packages import optional_package

_PATTERNS = ("*.safetensors", "*.bin", "*.pth")
_MAX_LAYERS = 1024


def check_folder(folder: Path, config: Path) -> None:
    """Check a CLIP's configuration and weights without building the model or fetching anything.

    Args:
        folder: the folder of the weights, which must be there.
        config: its `open_clip_config.json`.

    Raises:
        ValueError: the configuration cannot be read, is larger than its weights, or names a model of a hub, which
            open_clip would download; the message names the file.
    """
    content = bounded_json.load_object(config.read_bytes(), str(config), max_bytes=1 << 20)
    model = content.get("model_cfg", content)
    if not isinstance(model, dict):
        raise ValueError(f"{config}: 'model_cfg' must be an object, got {type(model).__name__}")
    files = sorted(path for pattern in _PATTERNS for path in folder.glob(pattern))
    for file in files:
        weights.is_pytorch(file)  # names pointers, web pages and empty files
        weights.check_archive(file)
    size = max(file.stat().st_size for file in files)
    for place, value in _leaves(model):
        _check_leaf(place, value, folder, config)
    if "vision_cfg" not in model or "text_cfg" not in model:
        raise ValueError(f"{config} lacks 'vision_cfg' or 'text_cfg', which a CLIP needs")
    if not any(place[-1] in ("hf_model_name", "timm_model_name") and value for place, value in _leaves(model)):
        _check_size(model, size, config)


def _check_leaf(place: tuple[str, ...], value: Any, folder: Path, config: Path) -> None:
    name = place[-1]
    if isinstance(value, (int, float)) and not abs(value) < 1 << 31:
        raise ValueError(f"{config}: {name} is {value}, and must be below {1 << 31:,}")
    if "layers" in place and isinstance(value, int) and value > _MAX_LAYERS:
        raise ValueError(f"{config}: {name} is {value:,}, and at most {_MAX_LAYERS:,} layers are built")
    if name in ("hf_model_name", "hf_tokenizer_name") and isinstance(value, str) and value:
        local = Path(value).is_dir() or (name == "hf_tokenizer_name" and (folder / "tokenizer.json").is_file())
        if not local:
            raise ValueError(
                f"{config} names {value!r} of the Hugging Face hub under {name}, which would be downloaded; a model "
                "file fetches nothing: name the model itself as hf-hub:OWNER/NAME to allow it"
            )


def _check_size(model: dict[str, Any], size: int, config: Path) -> None:
    """Refuse a configuration of more parameters than the bytes of its weights' file."""
    open_clip = optional_package("open_clip")
    own = {key: value for key, value in model.items() if key != "custom_text"}
    kind = open_clip.CustomTextCLIP if model.get("custom_text") else open_clip.CLIP
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in kind(**own).parameters())
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, ArithmeticError, AssertionError) as error:
        raise ValueError(f"{config} describes no CLIP of open_clip: {str(error).splitlines()[:1]}") from error
    if count > size:
        raise ValueError(f"{config} describes {count:,} parameters, and its weights have only {size:,} bytes")


def _leaves(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Iterate over the plain values of a configuration, each with the names that lead to it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, (*place, name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, place)
    elif place:
        yield place, value
