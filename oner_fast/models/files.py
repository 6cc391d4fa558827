"""Save and load a model as one safetensors file that holds its weights, configuration, and OneR's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from oner_fast import format_version
from oner_fast.atomic import write_atomic
from oner_fast.models import eva
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.models.uta import UTA, UTAConfig

FORMAT = "oner_fast.oner"
UTA_FORMAT = "oner_fast.uta"

_Model = TypeVar("_Model", bound=nn.Module)


def save_model(path: Path | str, tower: OneR, tokenizer_json: str) -> None:
    """Write `tower` and its tokenizer to `path`, which is replaced at once."""
    _write(
        Path(path),
        tower,
        {
            "format": FORMAT,
            format_version.FIELD: str(format_version.MODEL),
            "config": json.dumps(asdict(tower.config)),
            "tokenizer": tokenizer_json,
        },
    )


def save_uta(path: Path | str, model: UTA, extra_metadata: Mapping[str, str] | None = None) -> None:
    """Write `model` to `path`, which is replaced at once.

    `extra_metadata` adds entries to the file's metadata, for example the teacher. Raises ValueError where one of them
    is named `format` or `config`.
    """
    own = {
        "format": UTA_FORMAT,
        format_version.FIELD: str(format_version.MODEL),
        "config": json.dumps(asdict(model.config)),
    }
    extra = dict(extra_metadata or {})
    if taken := own.keys() & extra.keys():
        raise ValueError(f"extra_metadata may not hold {', '.join(sorted(taken))}, which the file itself uses")
    _write(Path(path), model, own | extra)


def _write(path: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    data = _ordered(save(tensors, metadata))
    write_atomic(path, lambda file: file.write(data))


def _ordered(data: bytes) -> bytes:
    """Sort the file's metadata, which safetensors writes from a hash map in an order that differs each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin aligned
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def load_model(path: Path | str) -> tuple[OneR, str]:
    """Read the file of `save_model`: the tower (float32, evaluation mode) and the tokenizer's JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a model of this library, or its weights do not fit its configuration.
    """
    path = Path(path)
    state, metadata = _read(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a model of oner_fast: its format is {metadata.get('format')!r}, not {FORMAT!r}"
        )
    tower = OneR(config_from_dict(json.loads(metadata["config"])))
    return _filled(tower, state, f"{path}: the weights do not fit the configuration beside them"), metadata["tokenizer"]


def load_uta(source: Path | str | Mapping[str, Any], config: UTAConfig | None = None) -> UTA:
    """Load a student (float32, evaluation mode) from weights in any layout of `oner_fast.models.eva`.

    Args:
        source: a file of `save_uta`; a safetensors file or a PyTorch checkpoint (only the weights are read) in EVA's or
            timm's layout, alone or as the vision tower of a CLIP; or such a state dict.
        config: the sizes. By default they come from the file of `save_uta`. If given, positions of another grid are
            resampled to its grid.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights are in no known layout or do not fit, or `config` is needed.
    """
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    state, metadata = _read_any(source)
    layout = eva.layout_of(state)
    if metadata.get("format") == UTA_FORMAT and config is None:
        config = uta_config_from_dict(json.loads(metadata["config"]))
    if config is None:
        raise ValueError(f"{name} does not hold its configuration: pass config, for example UTA_SIZES['b']")
    if layout == "oner_fast":
        state = {name: tensor for name, tensor in state.items() if config.mask_token or "mask_token" not in name}
        positions = torch.cat([state["cls_position"].unsqueeze(0), state["patch_embedding.positions"]])
        state["patch_embedding.positions"] = eva.resample_positions(positions.unsqueeze(0), config.grid)[0, 1:]
    else:
        state = (eva.from_eva if layout == "eva" else eva.from_timm)(state, config)
    return _filled(UTA(config), state, f"{name}: the weights do not fit the configuration")


def read_metadata(path: Path | str) -> dict[str, str]:
    """Read the metadata of a safetensors file: `format`, `config`, and the teacher of a student.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return _checked(path, file.metadata())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _read_any(source: Path | str | Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    if isinstance(source, Mapping):
        return _unwrapped(source), {}
    path = Path(source)
    if path.suffix not in (".pt", ".pth", ".bin"):
        return _read(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file {path}")
    return _unwrapped(torch.load(path, map_location="cpu", weights_only=True)), {}


def _unwrapped(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict within a checkpoint, without the prefix that DistributedDataParallel adds to its names."""
    for key in ("model_ema", "model", "module", "state_dict"):
        if isinstance(inner := checkpoint.get(key), Mapping):
            checkpoint = inner
    return {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return state, _checked(path, file.metadata())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _checked(path: Path, metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return a file's metadata; ValueError where the file is one of ours in a newer format."""
    found = dict(metadata or {})
    if found.get("format") in (FORMAT, UTA_FORMAT):
        format_version.check_format_version(path, found.get(format_version.FIELD), format_version.MODEL)
    return found


def _filled(model: _Model, state: Mapping[str, Tensor], problem: str) -> _Model:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{problem}: {error}") from error
    return model.eval()


def config_from_dict(values: dict[str, object]) -> OneRConfig:
    """Make a configuration from JSON values; ValueError for an unknown key."""
    return OneRConfig(**_settings(OneRConfig, values))


def uta_config_from_dict(values: dict[str, object]) -> UTAConfig:
    """Make a student's configuration from JSON values; ValueError for an unknown key."""
    return UTAConfig(**_settings(UTAConfig, values))


def _settings(config: type[Any], values: dict[str, object]) -> dict[str, Any]:
    known = {field.name for field in fields(config)}
    if unknown := values.keys() - known:
        raise ValueError(f"unknown model settings {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
