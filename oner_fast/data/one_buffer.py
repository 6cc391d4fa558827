"""One buffer for all tensors of a batch, so that one copy moves the batch to a GPU.

A batch is a nest of dataclasses, named tuples, tuples, lists and dicts. Its tensors are views of a few storages, and
several of them may show the same images. `packed` copies each storage once into one buffer of bytes, and the views
become views of that buffer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")

_ALIGNED = 256
"""Bytes of which each storage's place in the buffer is a multiple, as of CUDA's own allocations."""


def with_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Rebuild a nest with each tensor replaced by `change(tensor)`.

    An object that occurs twice in the nest is rebuilt once, so that what was shared stays shared. A part without
    tensors stays the same object.
    """
    return cast(T, _Rebuilding(change).of(value))


def packed(value: T, *, pin: bool = False, at_most: int | None = None) -> tuple[Tensor, T]:
    """Copy the tensors of a nest, all of them on the CPU, into one buffer.

    Args:
        value: the nest.
        pin: take page-locked memory, from which a copy to a GPU does not wait.
        at_most: leave storages of more bytes as they are; None copies all.

    Returns:
        The buffer, (bytes,) uint8, and the nest of its views.
    """
    places: dict[int, int] = {}
    sources: list[tuple[int, Tensor]] = []
    size = 0

    def reserve(tensor: Tensor) -> Tensor:
        nonlocal size
        storage = tensor.untyped_storage()
        if storage._cdata not in places and (at_most is None or storage.nbytes() <= at_most):
            places[storage._cdata] = size
            sources.append((size, torch.empty(0, dtype=torch.uint8).set_(storage)))
            size += -(-storage.nbytes() // _ALIGNED) * _ALIGNED
        return tensor

    with_tensors(value, reserve)
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for begin, source in sources:
        buffer[begin : begin + source.numel()].copy_(source)
    view = _Views(buffer)

    def place(tensor: Tensor) -> Tensor:
        begin = places.get(tensor.untyped_storage()._cdata)
        if begin is None:
            return tensor
        return view(tensor, begin // tensor.itemsize + int(tensor.storage_offset()))

    return buffer, with_tensors(value, place)


def moved(buffer: Tensor, value: T, device: torch.device | str, *, non_blocking: bool = False) -> tuple[Tensor, T]:
    """Copy a buffer and the nest of its views (see `packed`) to another device, by one copy.

    Args:
        buffer: (bytes,) uint8.
        value: the nest of its views.
        device: where to.
        non_blocking: do not wait for the copy; it then needs page-locked memory.

    Returns:
        The buffer on `device`, and the nest of its views.
    """
    there = buffer.to(device, non_blocking=non_blocking)
    view = _Views(there)
    return there, with_tensors(value, lambda tensor: view(tensor, int(tensor.storage_offset())))


class _Views:
    """Make views of a buffer in the form of other tensors."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._typed: dict[torch.dtype, Tensor] = {}

    def __call__(self, like: Tensor, offset: int) -> Tensor:
        """Return the view with the dtype, shape and strides of `like`, from the number `offset` of its dtype on."""
        if like.dtype not in self._typed:
            self._typed[like.dtype] = self._buffer.view(like.dtype)
        return self._typed[like.dtype].as_strided(like.shape, like.stride(), offset)


class _Rebuilding:
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change = change
        self._done: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        if value is None or isinstance(value, (str, bytes, int, float)):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = self._rebuilt(value)
        return self._done[id(value)]

    def _rebuilt(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._change(value)
        if isinstance(value, dict):
            rebuilt = {key: self.of(each) for key, each in value.items()}
            return value if all(rebuilt[key] is each for key, each in value.items()) else rebuilt
        if isinstance(value, (tuple, list)):
            items = [self.of(each) for each in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found = {each.name: self.of(getattr(value, each.name)) for each in dataclasses.fields(value) if each.init}
            changed = {name: new for name, new in found.items() if new is not getattr(value, name)}
            return dataclasses.replace(value, **changed) if changed else value
        return value
