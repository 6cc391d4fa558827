"""Attention over packed sequences with dense kernels: sequences of equal length go together, without padding."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from oner_fast.ops.values import is_batched

Attend = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]


class _Rows(NamedTuple):
    """The rows of one side, sorted by group; `order` and `inverse` are None where they lie in that order already."""

    order: Tensor | None
    inverse: Tensor | None
    sizes: tuple[int, ...]


class Group(NamedTuple):
    """The numbers of the sequences of one pair of lengths."""

    sequences: tuple[int, ...]
    length_q: int
    length_k: int


def attend_by_length(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None
) -> Tensor:
    """Compute the attention of packed sequences, one dense call for each pair of lengths.

    The lengths are read on the host, so a call on CUDA waits for the device.

    Args:
        attend: takes q (n, H, Lq, Dh), k and v (n, Hk, Lk, Dh), and the numbers of these n sequences; it returns
            (n, H, Lq, Dh).
        query: (T, H, Dh).
        key: (Tk, Hk, Dh).
        value: (Tk, Hk, Dh).
        cu_seqlens_q: (S + 1,) int32.
        cu_seqlens_k: (S + 1,) int32, or None where keys have the boundaries of queries.

    Returns:
        (T, H, Dh). A query without keys gives 0.

    Raises ValueError where `torch.vmap` batches boundaries.
    """
    if not torch.compiler.is_compiling() and any(x is not None and is_batched(x) for x in (cu_seqlens_q, cu_seqlens_k)):
        raise ValueError(
            "varlen_attention: attention by length reads boundaries, which torch.vmap cannot batch here; loop over the "
            "batch, or build the C++ extension, whose kernels take them"
        )
    lengths_q = tuple(cu_seqlens_q.diff().tolist())
    lengths_k = lengths_q if cu_seqlens_k is None else tuple(cu_seqlens_k.diff().tolist())
    groups, rows_q, rows_k = _plan(lengths_q, lengths_k)
    outputs = []
    parts = zip(groups, _parts(query, rows_q), _parts(key, rows_k), _parts(value, rows_k), strict=True)
    for group, q, k, v in parts:
        if group.length_q == 0:
            continue
        if group.length_k == 0:
            # Zeros that still take part in the graph: their gradient is 0, not missing.
            outputs.append(q.masked_fill(q.new_ones((), dtype=torch.bool), 0.0))
            continue
        result = attend(
            q.unflatten(0, (len(group.sequences), group.length_q)).transpose(1, 2),
            k.unflatten(0, (len(group.sequences), group.length_k)).transpose(1, 2),
            v.unflatten(0, (len(group.sequences), group.length_k)).transpose(1, 2),
            group.sequences,
        )
        outputs.append(result.transpose(1, 2).flatten(0, 1))
    if not any(group.length_q and group.length_k for group in groups):
        # Nothing was attended to. The inputs take part with no rows: their gradients are 0, not missing.
        outputs += [x[:0].reshape(0, *query.shape[1:]) for x in (query, key, value)]
    packed = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return packed if rows_q.inverse is None else packed.index_select(0, rows_q.inverse.to(packed.device))


def _parts(packed: Tensor, rows: _Rows) -> tuple[Tensor, ...]:
    # One selection and one split: their backward is one addition and one concatenation, however many groups there are.
    ordered = packed if rows.order is None else packed.index_select(0, rows.order.to(packed.device))
    return ordered.split(list(rows.sizes)) if rows.sizes else ()


def groups_of(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> tuple[Group, ...]:
    """Group sequences by their pair of lengths, in the order in which the pairs occur first."""
    members: dict[tuple[int, int], list[int]] = {}
    for sequence, lengths in enumerate(zip(lengths_q, lengths_k, strict=True)):
        members.setdefault(lengths, []).append(sequence)
    return tuple(Group(tuple(sequences), *lengths) for lengths, sequences in members.items())


@lru_cache(maxsize=32)
def _plan(lengths_q: tuple[int, ...], lengths_k: tuple[int, ...]) -> tuple[tuple[Group, ...], _Rows, _Rows]:
    groups = groups_of(lengths_q, lengths_k)
    in_order = [sequence for group in groups for sequence in group.sequences]
    rows_q = _rows(lengths_q, in_order, tuple(len(group.sequences) * group.length_q for group in groups))
    rows_k = _rows(lengths_k, in_order, tuple(len(group.sequences) * group.length_k for group in groups))
    return groups, rows_q, rows_k


def _rows(lengths: tuple[int, ...], samples: list[int], sizes: tuple[int, ...]) -> _Rows:
    if samples == sorted(samples):
        return _Rows(None, None, sizes)
    begins, sizes_in_order = torch.tensor(list(accumulate(lengths, initial=0))[:-1]), torch.tensor(lengths)[samples]
    ends = sizes_in_order.cumsum(0)
    # A row has the same offset from the start of its sequence before and after sorting.
    shift = begins[samples] - (ends - sizes_in_order)
    order = torch.arange(int(ends[-1])) + shift.repeat_interleave(sizes_in_order)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return _Rows(order, inverse, sizes)
