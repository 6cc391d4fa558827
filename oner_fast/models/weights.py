"""Weights of model files that others made: read safely, and compared with a configuration before a model is built."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_HEADER = 16 << 20
"""Largest header of a safetensors file, in bytes, and largest pickle of a PyTorch file; both list tensors only."""
_ENVELOPES = ("state_dict_ema", "model_ema", "state_dict", "model", "module")
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
_SHOWN = 3  # entries of a list that a message names

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C")


def read_weights(path: Path | str) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a model file of any name; its content tells whether it is safetensors or PyTorch's.

    Returns:
        The entries: tensors by name, or a PyTorch checkpoint as it was saved (see `state_dict_of`), and the metadata of
        a safetensors file, which are empty for a PyTorch file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not whole or is of another kind; the message says which and names the file.
    """
    path = Path(path)
    if is_pytorch(path):
        return _read_pytorch(path), {}
    with _safetensors(path) as file:
        return {name: _tensor(file, name, path) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_metadata(path: Path | str) -> dict[str, str]:
    """Read the metadata of a safetensors file alone. Raises as `read_weights` does."""
    path = Path(path)
    if is_pytorch(path):
        raise ValueError(f"{path} is not a safetensors file but a PyTorch checkpoint")
    with _safetensors(path) as file:
        return dict(file.metadata() or {})


def is_pytorch(path: Path) -> bool:
    """Tell whether a file holds what `torch.save` writes, and not safetensors. Raises as `read_weights` does."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and a model file is needed")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a device or a pipe, and a model file is needed")
    if not path.is_file():
        raise FileNotFoundError(f"there is no model file {path}")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty, so it is not a model file; copy or download it again")
    if head.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights themselves; fetch the file with git lfs pull")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not a model file; the download met an error or a login page")
    if head[8:9] == b"{":  # after the length of a safetensors header, whose own bytes may be any
        return False
    return head.startswith((b"PK\x03\x04", b"\x80"))


def state_dict_of(checkpoint: Mapping[Any, Any], name: str) -> dict[str, Tensor]:
    """Find the tensors in a checkpoint as trainers save them.

    The state dict may lie under `state_dict_ema`, `model_ema`, `state_dict`, `model` or `module`, the averaged weights
    first. The prefixes `module.` (DistributedDataParallel) and `_orig_mod.` (torch.compile) are removed.

    Raises:
        ValueError: there is no tensor, or two names become one; the message begins with `name`.
    """
    for _ in _ENVELOPES:  # an envelope may hold another
        inner = next((checkpoint[key] for key in _ENVELOPES if isinstance(checkpoint.get(key), Mapping)), None)
        if inner is None:
            break
        checkpoint = inner
    found: dict[str, Tensor] = {}
    for key, tensor in checkpoint.items():
        if isinstance(key, str) and isinstance(tensor, Tensor):
            plain = _WRAPPERS.sub("", key)
            if plain in found:
                raise ValueError(f"{name} holds two tensors for {plain!r}, with and without a wrapper's prefix")
            found[plain] = tensor
    if not found:
        raise ValueError(f"{name} holds no tensors under the names of a state dict, but {_some(checkpoint)}")
    return found


def filled(build: Callable[[], M], state: Mapping[str, Tensor], name: str, *sizes: int) -> M:
    """Build a model and give it the weights `state`, once their names, shapes and kinds are known to fit.

    The model is first built without memory, on the device `meta`, so that a configuration of any size costs nothing.

    Args:
        build: builds the model from its configuration.
        state: the weights.
        name: the file, with which errors begin.
        sizes: the configuration's numbers of layers, each of which needs at least one tensor.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: the configuration describes no model, or another one than the weights are for.
    """
    if wrong := [size for size in sizes if isinstance(size, bool) or not isinstance(size, int)]:
        raise ValueError(f"{name}: its configuration has {wrong[0]!r} layers, and a whole number is needed")
    if max(sizes, default=0) > len(state):
        raise ValueError(f"{name}: its configuration has {max(sizes):,} layers, and it holds {len(state):,} tensors")
    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except (ValueError, TypeError, RuntimeError, ArithmeticError, AttributeError, AssertionError) as error:
        raise ValueError(f"{name}: its configuration describes no model: {_one_line(error)}") from error
    _compare(expected, state, name)
    model = build()
    model.load_state_dict(state)
    return model.eval()


def check_settings(values: Any, name: str, *, largest: int = 1 << 31) -> dict[str, Any]:
    """Return the settings of a configuration; ValueError where one is no plain value, or no size of a model."""
    if not isinstance(values, dict):
        raise ValueError(f"{name}: its configuration is a {type(values).__name__}, and an object is needed")
    for key, value in values.items():
        if isinstance(value, (int, float)) and not abs(value) < largest:
            raise ValueError(f"{name}: {key} in its configuration is {value}, and must be below {largest:,}")
        if value is None or isinstance(value, (dict, str)):
            raise ValueError(f"{name}: {key} in its configuration must be a number, a truth value or a list of numbers")
    return values


def config_of(kind: type[C], values: Mapping[str, Any]) -> C:
    """Make a configuration, a dataclass whose every field has a default, from JSON values.

    Raises:
        ValueError: a setting is unknown, or a value is of another type than the field's default. A list needs as many
            numbers as the default.
    """
    known = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := values.keys() - known:
        raise ValueError(f"unknown model settings {_some(sorted(unknown))}; known: {', '.join(sorted(known))}")
    return kind(**{name: _like(known[name], value, name) for name, value in values.items()})


def _like(default: Any, value: Any, name: str) -> Any:
    """Return a setting where it is of its default's type; ValueError with the type that is needed otherwise."""
    if isinstance(default, tuple):
        if isinstance(value, (list, tuple)) and len(value) == len(default) and all(map(_is_number, value)):
            return tuple(value)
        needed = f"a list of {len(default)} numbers"
    elif isinstance(default, bool):
        if isinstance(value, bool):
            return value
        needed = "a truth value"
    elif isinstance(default, int):
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        needed = "a whole number"
    else:
        if _is_number(value):
            return value
        needed = "a number"
    raise ValueError(f"{name} is {repr(value)[:80]}, and {needed} is needed")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1 << 63 and isfinite(value)


def _compare(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights that do not fit; the tensors of `expected` have shapes and dtypes alone."""
    problem = f"{name}: the weights do not fit the configuration"
    if missing := [key for key in expected if key not in state]:
        raise ValueError(f"{problem}: it lacks {_some(missing)}")
    if extra := [key for key in state if key not in expected]:
        raise ValueError(f"{problem}: it holds {_some(extra)}, which the model lacks")
    for key, wanted in expected.items():
        given = state[key]
        if not isinstance(given, Tensor):
            raise ValueError(f"{problem}: {key} is a {type(given).__name__}, and a tensor is needed")
        if given.layout != torch.strided or given.is_quantized or given.is_meta:
            kind = "a meta" if given.is_meta else "a quantized" if given.is_quantized else f"a {given.layout}"
            raise ValueError(f"{problem}: {key} is {kind} tensor, and a dense one with values is needed")
        if given.shape != wanted.shape:
            raise ValueError(f"{problem}: {key} has shape {tuple(given.shape)}, and {tuple(wanted.shape)} is needed")
        if given.is_floating_point() != wanted.is_floating_point() or given.is_complex():
            raise ValueError(f"{problem}: {key} holds {given.dtype}, and {wanted.dtype} is needed")


def _safetensors(path: Path) -> Any:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 10 or header > size - 8:
        raise ValueError(f"{path} is not a safetensors file, or it is cut short at {size:,} bytes")
    if header > MAX_HEADER:
        raise ValueError(f"{path}: its header has {header:,} bytes, and at most {MAX_HEADER:,} are read")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a safetensors file: {_one_line(error)}") from error


def _tensor(file: Any, name: str, path: Path) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its tensor {name!r} cannot be read: {_one_line(error)}") from error
    return tensor


def _read_pytorch(path: Path) -> dict[str, Any]:
    """Read what `torch.save` wrote, without running any code in it, and refuse more data than the file's bytes."""
    check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged pickles raise many kinds
        raise ValueError(
            f"{path} cannot be read as a PyTorch checkpoint of plain weights: {_one_line(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, and a dict of weights is needed")
    return dict(content)


def check_archive(path: Path) -> None:
    """Refuse a zip archive of `torch.save` whose members are compressed, as a small file could then fill the memory."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise ValueError(
            f"{path} is cut short or damaged, so it is no PyTorch checkpoint: {_one_line(error)}"
        ) from error
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > path.stat().st_size:
            raise ValueError(f"{path}: its member {member.filename!r} is compressed, which torch.save never does")
        if member.filename.endswith("data.pkl") and member.file_size > MAX_HEADER:
            raise ValueError(f"{path}: its list of tensors has {member.file_size:,} bytes, over {MAX_HEADER:,}")


def _some(names: Any) -> str:
    """Name the first few of a list, and count the others."""
    shown = [str(name)[:80] for name in names]
    if not shown:
        return "nothing"
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN:,} others" if len(shown) > _SHOWN else "")


def _one_line(error: BaseException) -> str:
    """Return the first line of an error's text, without PyTorch's advice to load unsafely."""
    text = " ".join(str(error).split(" (1) ")[0].splitlines()[:1]) or type(error).__name__
    return text[:300]
