"""Read the weights of a file that anyone may have written: safetensors or PyTorch, under any usual convention."""

from __future__ import annotations

import errno
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oner_fast.models.file_kinds import file_kind
from oner_fast.models.safetensors_header import read_header

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "module")
"""Keys under which checkpoints keep their weights. The first that is there counts: averaged weights before others."""
_PREFIXES = re.compile(r"(?:^|(?<=\.))_orig_mod\.|^(?:module\.)+")
_LEVELS = 4
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|Unsupported (?:global|class) ([\w.]+)")


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the weights of a file by its content, whatever its suffix; see `unwrapped` for what is taken from it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no model, is damaged, or holds more than plain values; the message names it.
        OSError: the file cannot be read.
    """
    if file_kind(path) == "safetensors":
        return unwrapped(read_safetensors(path), str(path))
    content = read_pytorch(path)
    state = unwrapped(content, str(path))
    check_size(state, path)
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file. Raises as `read_state`."""
    from safetensors import SafetensorError  # here, so that a model runs where torch alone is installed
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {_first_line(error)}") from error
    except RuntimeError as error:
        raise _system_error(error, path) or error from None


def read_pytorch(path: Path) -> dict[str, Any]:
    """Read a PyTorch file with `weights_only=True`, so that no code in it can run, after its checksums.

    Raises:
        ValueError: it is damaged, holds no dict, or holds more than tensors and plain values.
        OSError: the file cannot be read.
    """
    mapped = file_kind(path) == "zip"
    if mapped:
        _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # torch raises many kinds on what it cannot read
        if _of_the_machine(error):
            raise
        if (system := _system_error(error, path)) is not None:
            raise system from error
        if found := _GLOBAL.search(str(error)):
            raise ValueError(
                f"{path} holds objects of {found[1] or found[2]} beside tensors, and no code of a file is run; save "
                "its state dict alone with torch.save(model.state_dict(), path)"
            ) from error
        raise ValueError(f"{path} is damaged or is no PyTorch file: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and a state dict is needed")
    return content


def unwrapped(checkpoint: Mapping[Any, Any], name: str = "the state dict") -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the names that its model gave them.

    The weights may lie under any of `WRAPPERS`. The prefixes `module.` of DistributedDataParallel and `_orig_mod.` of
    torch.compile are removed. Values that are no tensors are left out.

    Raises:
        ValueError: there is no tensor, a tensor is sparse or quantised, or two have the same name; the message starts
            with `name`.
    """
    for _ in range(_LEVELS):
        inner = next((checkpoint[key] for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)), None)
        if inner is None:
            break
        checkpoint = inner
    state: dict[str, Tensor] = {}
    for given, tensor in checkpoint.items():
        if not isinstance(given, str) or not isinstance(tensor, Tensor):
            continue
        plain = plain_name(given)
        if plain in state:
            raise ValueError(f"{name} holds {plain!r} twice, with and without the prefix module. or _orig_mod.")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name}: its tensor {given!r} is sparse or quantised, and a dense one is needed")
        state[plain] = tensor
    if not state:
        held = ", ".join(sorted(key[:40] for key in checkpoint if isinstance(key, str))[:6]) or "nothing"
        raise ValueError(f"{name} holds no weights: it holds {held}")
    return state


def plain_name(name: str) -> str:
    """Remove from a tensor's name the prefixes that DistributedDataParallel and torch.compile add."""
    while (shorter := _PREFIXES.sub("", name)) != name:
        name = shorter
    return name


def check_size(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError where tensors of a PyTorch file are larger than the file, as expanded or shared ones can be."""
    needed, there = sum(tensor.numel() * tensor.element_size() for tensor in state.values()), path.stat().st_size
    if needed > 2 * there + 2**20:  # tied weights may be there once
        raise ValueError(f"{path}: its tensors would take {needed:,} bytes, and the file has {there:,}")


def _check_archive(path: Path) -> None:
    """Raise ValueError unless the file is an archive of torch whose checksums are right; torch itself checks none."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = {member.filename.rpartition("/")[2] for member in members}
            stored = not any(member.compress_type for member in members)
            damaged = archive.testzip() if stored else None
    except MemoryError:
        raise
    except Exception as error:  # zipfile raises many kinds on garbage
        if _of_the_machine(error):
            raise
        raise ValueError(f"{path} is damaged or cut short: {_first_line(error)}") from error
    if "constants.pkl" in names:
        raise ValueError(
            f"{path} is a TorchScript archive, which holds code; save the state dict of the model alone: "
            "torch.save(torch.jit.load(file).state_dict(), path)"
        )
    if not stored:
        raise ValueError(f"{path} is a compressed zip archive, which torch does not write; unpack it first")
    if any(member.external_attr & 0x10 for member in members):
        raise ValueError(f"{path} is damaged: it holds a folder where a member should be")
    if damaged is not None:
        raise ValueError(f"{path} is damaged: the checksum of its member {damaged[:80]!r} does not match")
    if "data.pkl" not in names:
        raise ValueError(f"{path} is a zip archive and no PyTorch file; unpack it first")


def _of_the_machine(error: Exception) -> bool:
    """Whether an error says nothing about the file's content; EINVAL comes from a place before the file's start."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def _system_error(error: Exception, path: Path) -> OSError | None:
    """Return the error of the system that torch met when it mapped the file, and told as a RuntimeError."""
    found = re.search(r"(?:open|map|stat)\b.*: [^:]+ \((\d+)\)$", str(error).strip().partition("\n")[0])
    return OSError(int(found[1]), os.strerror(int(found[1])), str(path)) if found else None


def _first_line(error: Exception) -> str:
    """Cause of an error in one line, without torch's advice to load the file with its code."""
    if isinstance(error, OSError):
        return "a part of it would lie outside of the file"
    if isinstance(error, EOFError):
        return "it ends too early"
    lines = str(error).partition("WeightsUnpickler error: ")[2].strip() or str(error).strip()
    if lines.startswith("Weights only load failed"):
        return "it holds more than tensors and plain values"
    return lines.splitlines()[0][:300] if lines else type(error).__name__
