"""Compare the shapes of weights with a configuration before its model is built."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from oner_fast.models.safetensors_header import Header
from oner_fast.models.state_files import plain_name

_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_LISTED = 4
_BLOCK = re.compile(r"(.*?)blocks\.(\d+)\.(.*)", re.DOTALL)
_Model = TypeVar("_Model", bound=nn.Module)

Shapes = dict[str, tuple[int, ...]]


class Found(NamedTuple):
    """Shapes of the weights that a file holds, and the names of those that are not floating-point numbers."""

    shapes: Shapes
    others: dict[str, str]

    @classmethod
    def in_header(cls, header: Header) -> Found:
        """Read them from the header of a safetensors file, under the names without prefixes."""
        entries = {plain_name(name): entry for name, entry in header.tensors.items()}
        others = {name: entry.dtype for name, entry in entries.items() if entry.dtype not in _FLOATS.values()}
        return cls({name: entry.shape for name, entry in entries.items()}, others)

    @classmethod
    def in_state(cls, state: Mapping[str, Tensor]) -> Found:
        """Read them from a state dict."""
        others = {name: str(tensor.dtype) for name, tensor in state.items() if tensor.dtype not in _FLOATS}
        return cls({name: tuple(tensor.shape) for name, tensor in state.items()}, others)


def check_fit(found: Found, build: Callable[[], nn.Module], depth: Callable[[str], int], problem: str) -> None:
    """Raise ValueError, which starts with `problem`, unless the weights are exactly those of the model.

    Only shapes are computed, on the meta device and for one block, so that sizes of any magnitude take no memory.

    Args:
        found: the weights that are there.
        build: makes the model with one block in each of its trunks, whose names hold `blocks.0.`.
        depth: number of blocks that the configuration asks for, by the part of the names before `blocks.`.
        problem: beginning of the message, with the file's name.
    """
    try:
        with torch.device("meta"):
            one = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    except (RuntimeError, ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"{problem}: no model has these sizes ({str(error).splitlines()[0][:200]})") from error
    there: dict[str, set[str]] = {}
    for name in found.shapes:
        if part := _BLOCK.match(name):
            there.setdefault(part[1], set()).add(part[2])
    wanted: Shapes = {}
    for name, shape in one.items():
        if (part := _BLOCK.match(name)) is None:
            wanted[name] = shape
            continue
        asked, held = depth(part[1]), len(there.get(part[1], ()))
        if asked != held:
            raise ValueError(f"{problem}: it asks for {asked:,} blocks, and the weights hold {held:,}")
        if len(wanted) > 2 * len(found.shapes):
            raise ValueError(f"{problem}: most tensors of its {asked:,} blocks are missing")
        wanted |= {f"{part[1]}blocks.{index}.{part[3]}": shape for index in range(asked)}
    check_shapes(found, wanted, problem)


def check_shapes(found: Found, wanted: Shapes, problem: str) -> None:
    """Raise ValueError, which starts with `problem`, unless names and shapes are the same and all are floats."""
    missing, extra = sorted(wanted.keys() - found.shapes.keys()), sorted(found.shapes.keys() - wanted.keys())
    if missing or extra:
        parts = [f"{word} {_listed(names)}" for word, names in (("missing", missing), ("extra", extra)) if names]
        raise ValueError(f"{problem}: {'; '.join(parts)}")
    for name, shape in wanted.items():
        if found.shapes[name] != shape:
            raise ValueError(f"{problem}: {name} has shape {list(found.shapes[name])}, and {list(shape)} is needed")
    for name, dtype in found.others.items():
        raise ValueError(f"{problem}: {name} has dtype {dtype}, and a floating-point one of 16 to 64 bits is needed")


def filled(model: _Model, state: Mapping[str, Tensor], problem: str) -> _Model:
    """Load the weights and set the model to evaluation; ValueError, which starts with `problem`, if they do not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{problem}: {error}") from error
    return model.eval()


def _listed(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED:,} more" if len(names) > _LISTED else shown
