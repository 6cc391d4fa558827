"""The address ranges that a launch may touch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def extent(tensor: Any) -> tuple[int, int]:
    """Return the first address of a CPU tensor and the one past its last.

    These are its own bytes when it is contiguous, and its whole storage otherwise. A wrapper of Triton's around a
    tensor counts as the tensor.

    Raises:
        TypeError: the tensor is not on the CPU.
    """
    found = tensor if hasattr(tensor, "untyped_storage") else tensor.base
    if found.device.type != "cpu":
        raise TypeError(f"a tensor on {found.device} was passed; kernels run here on CPU tensors")
    if found.is_contiguous():
        return found.data_ptr(), found.data_ptr() + found.numel() * found.element_size()
    storage = found.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def regions(tensors: Iterable[Any], buffers: Iterable[tuple[int, int]] = ()) -> list[tuple[int, int]]:
    """Return the sorted, disjoint address ranges of tensors and of (address, bytes) buffers.

    Views that overlap become one range, and empty ones none.
    """
    found: list[tuple[int, int]] = []
    for low, high in sorted([*map(extent, tensors), *((address, address + size) for address, size in buffers)]):
        if low == high:
            continue
        if found and low < found[-1][1]:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return found
