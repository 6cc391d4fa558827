"""Pack ragged lists of token ids into one flat tensor and its boundaries."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, chain

import torch
from torch import Tensor

try:
    from oner_fast._native import pack as _native_pack
except ImportError:
    _native_pack = None

Packed = tuple[Tensor, Tensor]


def pack_python(lists: list[list[int]]) -> Packed:
    """Pack in plain Python, with the results and errors of `pack`."""
    for i, row in enumerate(lists):
        if not isinstance(row, list):
            raise TypeError(f"pack: lists[{i}] must be a list of int, got {type(row).__name__}")
    ends = list(accumulate(map(len, lists), initial=0))
    if ends[-1] > 2**31 - 1:
        raise ValueError("pack: more than 2^31 - 1 values in all, which cu_seqlens in int32 cannot count")
    for i, row in enumerate(lists):
        for j, value in enumerate(row):
            if not isinstance(value, int):
                raise TypeError(f"pack: lists[{i}][{j}] must be an int, got {type(value).__name__}")
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"pack: lists[{i}][{j}] does not fit int64")
    flat = list(chain.from_iterable(lists))
    return torch.tensor(flat, dtype=torch.int64), torch.tensor(ends, dtype=torch.int32)


def pack_native(lists: list[list[int]]) -> Packed:
    """Pack by the compiled module, which writes the values straight into the tensors' memory."""
    if _native_pack is None:
        raise RuntimeError("pack: the compiled module oner_fast._native is not built; 'oner-fast doctor' says why")
    values, boundaries = _native_pack(lists)
    flat = torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)
    return flat, torch.frombuffer(boundaries, dtype=torch.int32)


pack: Callable[[list[list[int]]], Packed] = pack_python if _native_pack is None else pack_native
"""Pack lists of int: `pack(lists) -> (flat (T,) int64, cu_seqlens (B + 1,) int32)`.

The compiled module computes it where it is built. Raises TypeError for anything but a list of int, naming its place,
and ValueError for a value outside int64.
"""
