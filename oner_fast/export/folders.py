"""Write the folders of `oner-fast export`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from oner_fast import bounded_json
from oner_fast.atomic import write_atomic
from oner_fast.data.tokenizer import PAD, UNK
from oner_fast.export.convert import plain_config, plain_state
from oner_fast.export.loading_guides import onnx_guide, plain_guide, transformers_guide
from oner_fast.export.model_card import model_card
from oner_fast.loading import Loaded

_CODE = ("configuration_oner.py", "modeling_oner.py", "image_processing_oner.py", "plain_tower.py")
_PREPROCESSING = "shorter side resized to image_size (bicubic), centre square, (value / 255 - image_mean) / image_std"


@dataclass(frozen=True)
class Source:
    """A run and its model, about to be exported."""

    run: Path
    loaded: Loaded

    @property
    def config(self) -> dict[str, Any]:
        """Sizes of the tower, by the names of the exported `config.json`."""
        return plain_config(self.loaded.config)

    @property
    def state(self) -> dict[str, Tensor]:
        """Weights of the tower, by the names of `PlainTower`."""
        return plain_state(self.loaded.model)

    def card(self, loading: str) -> str:
        """The folder's README with its way of loading."""
        parameters = sum(tensor.numel() for tensor in self.state.values()) - 6  # mean and std are no parameters
        return model_card(self.run, self.config, parameters, loading)


def write_plain(source: Source, out: Path) -> None:
    """Write a folder for plain PyTorch: weights, sizes, tokenizer and README."""
    _write_files(out, {
        "config.json": _json(source.config | {"preprocessing": _PREPROCESSING}),
        "model.safetensors": save(source.state, {"format": "pt"}),
        "tokenizer.json": source.loaded.tokenizer.to_json().encode(),
        "README.md": source.card(plain_guide(source.config)).encode(),
    })  # fmt: skip


def write_transformers(source: Source, out: Path) -> None:
    """Write a folder for transformers' Auto classes, with the code that it runs."""
    config, tokenizer = source.config, source.loaded.tokenizer
    auto = {"AutoConfig": "configuration_oner.OneRConfig", "AutoModel": "modeling_oner.OneRModel"}
    processor = {"AutoImageProcessor": "image_processing_oner.OneRImageProcessor"}
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_text_tokens"]}
    code = resources.files("oner_fast.export.hub")
    _write_files(out, {
        "config.json": _json({
            "model_type": "oner", "architectures": ["OneRModel"], "auto_map": auto, "dtype": "float32", **config
        }),
        "model.safetensors": save({f"tower.{name}": each for name, each in source.state.items()}, {"format": "pt"}),
        "tokenizer.json": tokenizer.to_json().encode(),
        "tokenizer_config.json": _json(words | {"pad_token": PAD, "unk_token": UNK, "padding_side": "right"}),
        "preprocessor_config.json": _json({
            "image_processor_type": "OneRImageProcessor", "auto_map": processor, "size": config["image_size"]
        }),
        **{name: code.joinpath(name).read_bytes() for name in _CODE},
        "README.md": source.card(transformers_guide(config)).encode(),
    })  # fmt: skip


def write_onnx(source: Source, out: Path, precision: str, errors: dict[str, float], files: dict[str, bytes]) -> None:
    """Write a folder of ONNX graphs: `files` are the graphs and their weights, `errors` those of each graph."""
    _write_files(out, {
        **files,
        "config.json": _json(source.config | {"preprocessing": _PREPROCESSING, "precision": precision}),
        "tokenizer.json": source.loaded.tokenizer.to_json().encode(),
        "README.md": source.card(onnx_guide(source.config, errors, precision)).encode(),
    })  # fmt: skip


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def check_folder(out: Path, names: Iterable[str]) -> None:
    """Refuse to replace files that no export wrote, such as a run's own `config.json` or a project's README.md.

    Args:
        out: the folder to be written.
        names: names of the files that would be written.

    Raises:
        ValueError: `out` holds one of them, and no `config.json` of an export.
    """
    taken = [name for name in names if (out / name).exists()]
    if taken and not _is_export(out):
        raise ValueError(
            f"{out} holds {taken[0]}, which no export wrote and which would be replaced; give --out another folder"
        )


def _is_export(out: Path) -> bool:
    try:
        config = bounded_json.load_object((out / "config.json").read_bytes(), "config.json")
    except (OSError, ValueError):
        return False
    return {"mlp_width", "head_width", "embed_dim"} <= config.keys()


def _write_files(out: Path, files: dict[str, bytes]) -> None:
    """Write files into `out`, each atomically, config.json first; those of other names stay."""
    check_folder(out, files)
    out.mkdir(parents=True, exist_ok=True)
    files = {"config.json": files["config.json"], **files}  # a folder that a kill left half written is known by it
    for name, content in files.items():
        write_atomic(out / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
