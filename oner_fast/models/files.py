"""A trained tower as one safetensors file that holds all it needs: weights, configuration and tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from oner_fast.atomic import write_atomic
from oner_fast.models.oner import OneR, OneRConfig

FORMAT = "oner_fast.oner"


def save_model(path: Path | str, tower: OneR, tokenizer_json: str) -> None:
    """Write ``tower`` and its tokenizer to ``path``, which is whole at any moment."""
    path = Path(path)
    metadata = {"format": FORMAT, "config": json.dumps(asdict(tower.config)), "tokenizer": tokenizer_json}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tower.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    data = _ordered(save(tensors, metadata))
    write_atomic(path, lambda file: file.write(data))


def _ordered(data: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors writes a hash map, whose order differs each time."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin aligned
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def load_model(path: Path | str) -> tuple[OneR, str]:
    """Read what :func:`save_model` wrote: the tower (float32, evaluation mode) and the tokenizer's JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a model of this library, or its weights do not fit its configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a model of oner_fast: its format is {metadata.get('format')!r}, not {FORMAT!r}"
        )
    tower = OneR(config_from_dict(json.loads(metadata["config"])))
    try:
        tower.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit the configuration beside them: {error}") from error
    return tower.eval(), metadata["tokenizer"]


def config_from_dict(values: dict[str, object]) -> OneRConfig:
    """A configuration from JSON; ValueError for an unknown key."""
    known = {field.name for field in fields(OneRConfig)}
    if unknown := values.keys() - known:
        raise ValueError(f"unknown model settings {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return OneRConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})  # type: ignore[arg-type]
