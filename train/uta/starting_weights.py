"""Begin a training of UTA with the weights of a run or a file (`--init-from`)."""

from __future__ import annotations

from pathlib import Path

from oner_fast import bounded_json
from oner_fast.models.file_kinds import file_kind
from oner_fast.models.files import UTA_FORMAT, load_uta, read_metadata, uta_config_from_dict
from oner_fast.models.state_files import read_pytorch
from oner_fast.models.uta import UTA, UTAConfig
from oner_fast.train.config.sizes import require_same_sizes

_FREE = ("image_size", "patch_size", "grad_checkpointing")


def starting_student(path: Path, config: UTAConfig) -> UTA:
    """Load a student with the sizes of a configuration; positions of another grid are resampled, and so is the patch
    embedding of another patch size where the weights are in our own layout.

    Args:
        path: a file of this library (a `model.safetensors` or a checkpoint), or one in EVA's or timm's layout.
        config: the sizes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights are in no known layout, are damaged or have other sizes.
    """
    if file_kind(path) == "safetensors":
        about = read_metadata(path)
        if about.get("format") == UTA_FORMAT:
            _check_sizes(path, about.get("config", ""), config)
        return load_uta(path, config)
    content = read_pytorch(path)
    if content.get("kind") != UTA_FORMAT:
        return load_uta(path, config)
    _check_sizes(path, content["model_config"], config)
    # The second stage keeps the student beside a temperature.
    student = {key.removeprefix("student."): each for key, each in content["student"].items() if key != "scale"}
    return load_uta(student, config)


def _check_sizes(path: Path, text: str, config: UTAConfig) -> None:
    name = f"the configuration in {path}"
    require_same_sizes(str(path), uta_config_from_dict(bounded_json.load_object(text, name), name), config, _FREE)
