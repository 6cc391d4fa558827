"""Begin the training of a CLIP with the weights of a run or a file (`--init-from`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from oner_fast import bounded_json
from oner_fast.models.clip import WEIGHTS, CLIPConfig, build_clip, check_clip, clip_config_from_dict, load_clip
from oner_fast.models.fitting import Found, filled
from oner_fast.models.optional_packages import optional_package
from oner_fast.train.config.sizes import require_same_sizes
from oner_fast.train.engine import checkpoint

_FREE = ("image_size", "context_length")
_KIND = "oner_fast.clip"


def starting_clip(path: Path, config: CLIPConfig) -> nn.Module:
    """Build a CLIP with the sizes of a configuration and the weights of a file, its temperature too.

    open_clip resamples the positions of another grid and another context length.

    Args:
        path: an `open_clip_model.safetensors` with `open_clip_config.json` beside it, or a checkpoint of `oner-fast
            train clip`.
        config: the sizes.

    Raises:
        FileNotFoundError: there is no such file, or no configuration beside it.
        ValueError: the file is damaged, holds another model or has other sizes.
    """
    there, state = _folder(path) if path.name == WEIGHTS else _checkpoint(path)
    require_same_sizes(str(path), there, config, _FREE)
    model = build_clip(config)
    functions = optional_package("open_clip").model
    functions.resize_pos_embed(state, model)
    functions.resize_text_pos_embed(state, model)
    return filled(model, state, f"{path} does not fit this training").train()


def _folder(path: Path) -> tuple[CLIPConfig, dict[str, Tensor]]:
    model, config = load_clip(path.parent)
    return config, model.state_dict()


def _checkpoint(path: Path) -> tuple[CLIPConfig, dict[str, Tensor]]:
    state: dict[str, Any] = checkpoint.load(path)
    if state.get("kind") != _KIND:
        raise ValueError(f"{path} is no checkpoint of a CLIP, whose weights are needed")
    name = f"the configuration in {path}"
    config = clip_config_from_dict(bounded_json.load_object(state["model_config"], name), name)
    clip = {key.removeprefix("clip."): each for key, each in state["student"].items()}
    check_clip(Found.in_state(clip), config, f"{path}: the weights do not fit the configuration beside them")
    return config, clip
