"""The sequences of a packed row: their boundaries, from the positions or the numbers that transformers gives."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.ops.values import is_fake

_NAME = "_oner_fast_boundaries"


def unreadable(x: Tensor) -> bool:
    """Return whether the values of `x` cannot be read now: a graph is traced or captured, or there are none."""
    if torch.compiler.is_compiling() or x.device.type == "meta" or is_fake(x):
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def of_numbers(numbers: Tensor) -> Tensor:
    """Return the boundaries (S + 1,) int32 of the runs of equal numbers in the rows of (B, 1, 1, N)."""
    return _remembered(numbers, lambda: _boundaries(_starts((numbers[..., 1:] != numbers[..., :-1]).flatten(0, 2))))


def of_positions(position_ids: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Return the boundaries (S + 1,) int32 of the sequences packed into rows (B, N), or None where none is packed.

    A row is packed where its positions count up by one and restart, each time from the row's first position. Positions
    that jump elsewhere say nothing of sequences. Where they cannot be read, as inside torch.compile, the answer is not
    None, and sequences may be empty.
    """
    if position_ids is None or not _are_of(position_ids, batch, length):
        return None
    return _remembered(position_ids, lambda: _of_positions(position_ids, batch), batch)


def _of_positions(position_ids: Tensor, batch: int) -> Tensor | None:
    first, rest = position_ids[:, :1], position_ids[:, 1:]
    jumps = rest != position_ids[:, :-1] + 1
    restarts = jumps & ((rest == first) | ~jumps).all(1, keepdim=True)
    if not unreadable(restarts) and not bool(restarts.any()):
        return None
    return _boundaries(_starts(restarts).expand(batch, -1))


def _are_of(position_ids: Tensor, batch: int, length: int) -> bool:
    return position_ids.ndim == 2 and position_ids.shape[1] == length > 1 and position_ids.shape[0] in (1, batch)


def numbers_beside(mask: Tensor, seen: Tensor, position_ids: Tensor | None, batch: int) -> Tensor | None:
    """Return the number of each position's sequence (B, N) where rows are packed beside a mask, or None.

    `seen` (B, N) bool is False where a position is hidden. The positions of hidden ones say nothing: those of a batch
    padded on the left (0, 0, 0, 1, 2) restart, and hold one sequence. The answer is kept on `mask`.
    """
    length = mask.shape[3]
    if position_ids is None or not _are_of(position_ids, batch, length):
        return None
    given: Tensor = position_ids

    def make() -> Tensor | None:
        positions = given.expand(batch, -1)
        there = seen.expand(batch, -1)
        places = torch.arange(length, device=positions.device)
        latest = torch.where(there, places, -1).cummax(1).values
        before = F.pad(latest[:, :-1], (1, 0), value=-1)  # the place of the seen position before each
        step = positions - positions.gather(1, before.clamp_min(0))
        jumps = there & (before >= 0) & (step != 1) & (step != places - before)
        first = positions.gather(1, there.int().argmax(1, keepdim=True))
        restarts = jumps & ((positions == first) | ~jumps).all(1, keepdim=True)
        if not unreadable(restarts) and not bool(restarts.any()):
            return None
        return restarts.cumsum(1)

    found: Tensor | None = _remembered(mask, make, id(given), given._version if not given.is_inference() else 0)
    return found


def _starts(changes: Tensor) -> Tensor:
    """Mark the first position of each row, and each later one (B, N - 1) where something changes: (B, N) bool."""
    return F.pad(changes, (1, 0), value=True)


def _boundaries(starts: Tensor) -> Tensor:
    flat = starts.flatten()
    total = flat.shape[0]
    if unreadable(flat):  # the shape cannot depend on values: empty sequences fill it
        places = torch.arange(total, dtype=torch.int32, device=flat.device)
        return F.pad(torch.where(flat, places, total).sort().values, (0, 1), value=total).to(torch.int32)
    return F.pad(flat.nonzero().squeeze(1), (0, 1), value=total).to(torch.int32)


def _remembered(source: Tensor, make: Any, *key: int) -> Any:
    """Return `make()`, which the layers of a forward pass share: it is kept on `source` until that is written to."""
    if unreadable(source) or source.is_inference():
        return make()
    key = (source._version, *key)
    kept = getattr(source, _NAME, None)
    if kept is None or kept[0] != key:
        kept = (key, make())
        setattr(source, _NAME, kept)
    return kept[1]


def sequence_pairs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, queries: int, keys: int, causal: bool) -> Tensor:
    """Return which packed query sees which packed key: (1, 1, T, Tk) bool, as `varlen_attention` defines it."""
    own_q, left_q = _own(cu_seqlens_q, queries)
    own_k, left_k = _own(cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, keys)
    seen = own_q[:, None] == own_k
    if causal:
        seen = seen & (left_k >= left_q[:, None])
    return seen[None, None]


def _own(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the sequence of each of `total` rows, and how many rows follow it there."""
    rows = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    own = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    return own, cu_seqlens[own + 1] - 1 - rows
