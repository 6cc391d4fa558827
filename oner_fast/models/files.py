"""Save and load a model as one safetensors file that holds its weights, configuration, and OneR's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import nn

from oner_fast import bounded_json, format_version
from oner_fast.atomic import write_atomic
from oner_fast.models import eva, weights
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.models.uta import UTA, UTAConfig

S = TypeVar("S")
FORMAT = "oner_fast.oner"
UTA_FORMAT = "oner_fast.uta"


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
    state, metadata = weights.read_weights(path)
    if _checked(path, metadata).get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a model of oner_fast: its format is {metadata.get('format')!r}, not {FORMAT!r}"
        )
    for part in ("config", "tokenizer"):
        if part not in metadata:
            raise ValueError(f"{path} is not whole: its metadata lack {part!r}")
    return build_model(metadata["config"], weights.state_dict_of(state, str(path)), str(path)), metadata["tokenizer"]


def build_model(config: str, state: Mapping[str, Any], name: str) -> OneR:
    """Build a tower from the JSON of its configuration, and its weights; errors begin with `name`.

    Raises:
        ValueError: the configuration cannot be read, or the weights do not fit it.
    """
    sizes = _sizes(config_from_dict, config, name)
    return weights.filled(lambda: OneR(sizes), state, name, sizes.depth)


def build_uta(config: str, state: Mapping[str, Any], name: str) -> UTA:
    """Build a student as `build_model` builds a tower."""
    sizes = _sizes(uta_config_from_dict, config, name)
    return weights.filled(lambda: UTA(sizes), state, name, sizes.depth)


def _sizes(make: Callable[[dict[str, object]], S], text: str, name: str) -> S:
    """Make a configuration from its JSON; every ValueError begins with `name`."""
    values = weights.check_settings(bounded_json.loads(text, name, max_bytes=1 << 20), name)
    try:
        return make(values)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{name}: its configuration describes no model: {error}") from error


def load_uta(source: Path | str | Mapping[str, Any], config: UTAConfig | None = None) -> UTA:
    """Load a student (float32, evaluation mode) from weights in any layout of `oner_fast.models.eva`.

    Args:
        source: a file of `save_uta`; a safetensors file or a PyTorch checkpoint of any name (only the weights are read)
            in EVA's or timm's layout, alone or as the vision tower of a CLIP; or such a state dict.
        config: the sizes. By default they come from the file of `save_uta`. If given, positions of another grid are
            resampled to its grid.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights are in no known layout or do not fit, or `config` is needed.
    """
    given = isinstance(source, Mapping)
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    read, metadata = (dict(source), {}) if isinstance(source, Mapping) else weights.read_weights(source)
    if not given:
        _checked(name, metadata)
    state = weights.state_dict_of(read, name)
    if metadata.get("format") == UTA_FORMAT and config is None:
        if "config" not in metadata:
            raise ValueError(f"{name} is not whole: its metadata lack 'config'")
        sizes = _sizes(uta_config_from_dict, metadata["config"], name)
        return weights.filled(lambda: UTA(sizes), _without_mask_token(state, sizes), name, sizes.depth)
    layout = eva.layout_of(state)
    if config is None:
        raise ValueError(f"{name} does not hold its configuration: pass config, for example UTA_SIZES['b']")
    if layout == "oner_fast":
        state = _without_mask_token(state, config)
        positions = torch.cat([state["cls_position"].unsqueeze(0), state["patch_embedding.positions"]])
        state["patch_embedding.positions"] = eva.resample_positions(positions.unsqueeze(0), config.grid)[0, 1:]
    else:
        state = (eva.from_eva if layout == "eva" else eva.from_timm)(state, config)
    return weights.filled(lambda: UTA(config), state, name, config.depth)


def _without_mask_token(state: Mapping[str, Any], config: UTAConfig) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if config.mask_token or "mask_token" not in name}


def read_metadata(path: Path | str) -> dict[str, str]:
    """Read the metadata of a safetensors file: `format`, `config`, and the teacher of a student.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file.
    """
    return _checked(path, weights.read_metadata(path))


def _checked(path: Path | str, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a file's metadata; ValueError where the file is one of ours in a newer format."""
    found = dict(metadata)
    if found.get("format") in (FORMAT, UTA_FORMAT):
        format_version.check_format_version(path, found.get(format_version.FIELD), format_version.MODEL)
    return found


def config_from_dict(values: dict[str, object]) -> OneRConfig:
    """Make a configuration from JSON values; ValueError for an unknown key or a value of another type."""
    return weights.config_of(OneRConfig, values)


def uta_config_from_dict(values: dict[str, object]) -> UTAConfig:
    """Make a student's configuration from JSON values; ValueError for an unknown key or a value of another type."""
    return weights.config_of(UTAConfig, values)
