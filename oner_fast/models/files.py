"""Save and load a model as one safetensors file that holds its weights, configuration, and OneR's tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oner_fast import bounded_json, format_version
from oner_fast.atomic import write_atomic
from oner_fast.models import eva, timm_eva
from oner_fast.models.file_kinds import file_kind
from oner_fast.models.fitting import Found, check_fit, filled
from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.models.resampling import resample_patches, resample_positions
from oner_fast.models.safetensors_header import Header, read_header
from oner_fast.models.settings import from_dict
from oner_fast.models.state_files import read_safetensors, read_state, unwrapped
from oner_fast.models.uta import UTA, UTAConfig

FORMAT = "oner_fast.oner"
UTA_FORMAT = "oner_fast.uta"
SCALE = "log_logit_scale"
"""Entry of the metadata with the logarithm of 1 / temperature that the model was trained with or learnt."""


def save_model(path: Path | str, tower: OneR, tokenizer_json: str, log_logit_scale: float | None = None) -> None:
    """Write `tower`, its tokenizer and the logarithm of its scale to `path`, which is replaced at once."""
    _write(Path(path), model_bytes(tower, tokenizer_json, log_logit_scale))


def model_bytes(tower: OneR, tokenizer_json: str, log_logit_scale: float | None = None) -> bytes:
    """Return the content of the file that `save_model` writes."""
    metadata = {
        "format": FORMAT,
        format_version.FIELD: str(format_version.MODEL),
        "config": json.dumps(asdict(tower.config)),
        "tokenizer": tokenizer_json,
    }
    if log_logit_scale is not None:
        metadata[SCALE] = repr(log_logit_scale)
    return serialised(tower, metadata)


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
    _write(Path(path), serialised(model, own | extra))


def serialised(model: nn.Module, metadata: dict[str, str]) -> bytes:
    """Return the weights of a module with some metadata as the content of a safetensors file, always the same bytes."""
    from safetensors.torch import save  # here, so that a model runs where torch alone is installed

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return _ordered(save(tensors, metadata))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
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

    Nothing is built before the shapes in the file have been compared with its configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a model of this library, or its weights do not fit its configuration.
    """
    path = Path(path)
    header = _header(path)
    if (given := header.metadata.get("format")) != FORMAT:
        raise ValueError(
            f"{path} is not a model of oner_fast: its format is {bounded_json.shown(given)}, not {FORMAT!r}"
        )
    config = config_from_dict(_config(header, path), f"the configuration in {path}")
    tokenizer = _part(header, "tokenizer", path)
    problem = f"{path}: the weights do not fit the configuration beside them"
    check_oner(Found.in_header(header), config, problem)
    return filled(OneR(config), unwrapped(read_safetensors(path), str(path)), problem), tokenizer


def load_uta(source: Path | str | Mapping[str, Any] | nn.Module, config: UTAConfig | None = None) -> UTA:
    """Load a student (float32, evaluation mode) from weights in any layout of `oner_fast.models.eva`.

    Args:
        source: a file of `save_uta`; a safetensors file or a PyTorch checkpoint (only the weights are read) in EVA's or
            timm's layout, alone or as the vision tower of a CLIP; such a state dict; or an `Eva` of timm itself. A file
            is recognised by its content, so that its suffix does not matter. For the names that it may use see
            `oner_fast.models.state_files.unwrapped`.
        config: the sizes. By default they come from the file of `save_uta`, or from the `Eva`. If given, positions of
            another grid are resampled to its grid, and in our own layout a patch embedding of another patch size too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights are in no known layout or do not fit, `config` is needed, or an `Eva` computes what no
            student of its configuration does.
    """
    name, header = "the state dict", None
    if isinstance(source, nn.Module):
        if config is None:
            config = timm_eva.config_of(source)
        else:
            timm_eva.check_timm(source, config)
        source = source.state_dict()
    if isinstance(source, Mapping):
        state = unwrapped(source)
    else:
        path = Path(source)
        name = str(path)
        if file_kind(path) == "safetensors":
            header = _header(path)
            if config is None and header.metadata.get("format") == UTA_FORMAT:
                config = uta_config_from_dict(_config(header, path), f"the configuration in {path}")
                check_uta(Found.in_header(header), config, f"{path}: the weights do not fit the configuration")
        state = read_state(path)
    if config is None:
        raise ValueError(f"{name} does not hold its configuration: pass config, for example UTA_SIZES['b']")
    try:
        state = _converted(state, config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    problem = f"{name}: the weights do not fit the configuration"
    check_uta(Found.in_state(state), config, problem)
    return filled(UTA(config), state, problem)


def _converted(state: dict[str, Tensor], config: UTAConfig) -> dict[str, Tensor]:
    """Convert weights of any layout to our own, with positions of the configuration's grid."""
    layout = eva.layout_of(state)
    if layout != "oner_fast":
        return (eva.from_eva if layout == "eva" else eva.from_timm)(state, config)
    state = {each: tensor for each, tensor in state.items() if config.mask_token or "mask_token" not in each}
    patches, cls = state.get("patch_embedding.positions"), state["cls_position"]
    if patches is None or patches.ndim != 2 or cls.shape != patches.shape[1:]:
        raise ValueError("patch_embedding.positions is missing, or does not fit cls_position")
    positions = torch.cat([cls.unsqueeze(0), patches])
    state |= {"patch_embedding.positions": resample_positions(positions.unsqueeze(0), config.grid)[0, 1:]}
    name, channels = "patch_embedding.project.weight", len(config.image_mean)
    # A weight of anything else than square patches is left for the comparison of shapes, which names it.
    if name in state and state[name].ndim == 2 and _is_square(state[name].shape[1], channels):
        state[name] = resample_patches(state[name], channels, config.patch_size)
    return state


def _is_square(count: int, channels: int) -> bool:
    return count % channels == 0 and math.isqrt(count // channels) ** 2 * channels == count


def read_metadata(path: Path | str) -> dict[str, str]:
    """Read the metadata of a safetensors file: `format`, `config`, and the teacher of a student.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file, or a newer version of oner_fast wrote it.
    """
    return _header(Path(path)).metadata


def _header(path: Path) -> Header:
    """Read a file's header; ValueError where the file is one of ours in a newer format."""
    if file_kind(path) != "safetensors":
        raise ValueError(f"{path} is not a safetensors file but one of PyTorch")
    header = read_header(path)
    if header.metadata.get("format") in (FORMAT, UTA_FORMAT):
        format_version.check_format_version(path, header.metadata.get(format_version.FIELD), format_version.MODEL)
    return header


def _config(header: Header, path: Path) -> dict[str, Any]:
    return bounded_json.load_object(_part(header, "config", path), f"the configuration in {path}")


def _part(header: Header, name: str, path: Path) -> str:
    if name not in header.metadata:
        raise ValueError(f"{path} lacks {name!r} in its metadata; a model that this library saved holds it")
    return header.metadata[name]


def check_oner(found: Found, config: OneRConfig, problem: str) -> None:
    """Raise ValueError, which starts with `problem`, unless the weights are those of OneR's tower of this size."""
    check_fit(found, lambda: OneR(replace(config, depth=1)), lambda trunk: config.depth, problem)


def check_uta(found: Found, config: UTAConfig, problem: str) -> None:
    """Raise ValueError, which starts with `problem`, unless the weights are those of a student of this size."""
    check_fit(found, lambda: UTA(replace(config, depth=1)), lambda trunk: config.depth, problem)


def config_from_dict(values: dict[str, Any], name: str = "the configuration") -> OneRConfig:
    """Make a configuration from JSON values; ValueError, which starts with `name`, for an unknown key or value."""
    return from_dict(OneRConfig, values, name)


def uta_config_from_dict(values: dict[str, Any], name: str = "the configuration") -> UTAConfig:
    """Make a student's configuration from JSON values; ValueError, which starts with `name`, as `config_from_dict`."""
    return from_dict(UTAConfig, values, name)
