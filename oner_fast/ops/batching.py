"""Batching rules of the raw ops: what `torch.vmap` makes of them.

A rule takes the size of the batch, the batch dimension of each argument (None: the argument is shared), and the
arguments. It returns the results with a batch dimension each. A packed op takes the batch as further samples or
sequences, in one call, where every sum that it returns belongs to one sample alone. Else it is called once for each
element of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Dims = tuple[int | None, ...]
Flags = tuple[bool, ...]
Results = tuple[Tensor, ...]
Fold = Callable[..., Results | None]  # (size, arguments with the batch in front, which are batched) -> results or None


def rule(op: Callable[..., Any], fold: Fold | None) -> Callable[..., tuple[Any, Any]]:
    """Return the batching rule of the raw op `op` in the form that `torch.library.register_vmap` takes.

    `fold(op, size, batched, *arguments)` computes all elements at once. Batched arguments have the batch in front and
    `batched` says which they are. It returns results with the batch in front, or None where it cannot.
    """

    def batch(info: Any, in_dims: Dims, *arguments: Any) -> tuple[Any, Any]:
        batched = tuple(isinstance(dim, int) for dim in in_dims)  # a list of sizes has a list of None
        front = [x.movedim(dim, 0) if own else x for x, dim, own in zip(arguments, in_dims, batched, strict=True)]
        size = info.batch_size
        found = fold(op, size, batched, *front) if fold is not None and size else None
        results = _one_by_one(op, size, batched, front) if found is None else found
        return (results[0], 0) if len(results) == 1 else (results, (0,) * len(results))

    return batch


def _one_by_one(op: Callable[..., Any], size: int, batched: Flags, arguments: list[Any]) -> Results:
    """Call the op once for each element of the batch."""

    def call(pick: Callable[[Tensor], Tensor], of_shared: Callable[[Any], Any]) -> Results:
        found = op(*(pick(x) if own else of_shared(x) for x, own in zip(arguments, batched, strict=True)))
        return found if isinstance(found, tuple) else (found,)

    if size == 0:  # only shapes are needed
        like = next(x for x in arguments if isinstance(x, Tensor))
        shapes = call(
            lambda x: x.new_empty(x.shape[1:], device="meta"), lambda x: x.to("meta") if isinstance(x, Tensor) else x
        )
        return tuple(like.new_empty((0, *x.shape), dtype=x.dtype) for x in shapes)
    every = [call(lambda x, i=i: x[i], lambda x: x) for i in range(size)]  # type: ignore[misc]
    return tuple(torch.stack(column) for column in zip(*every, strict=True))


def rows(x: Tensor, own: bool, size: int) -> Tensor:
    """Make the batch part of the first dimension, (size, n, ...) -> (size * n, ...); a shared tensor is repeated."""
    return (x if own else x.expand(size, *x.shape)).flatten(0, 1)


def elements(x: Tensor, size: int, dim: int = 0) -> Tensor:
    """Part the dimension that `rows` joined, (size * n, ...) -> (size, n, ...), and move the batch to the front."""
    return x.unflatten(dim, (size, x.shape[dim] // size)).movedim(dim, 0)


def boundaries(cu_seqlens: Tensor, own: bool, size: int, packed: int) -> Tensor:
    """Join the boundaries of `size` batches of `packed` rows each: (S + 1,) or (size, S + 1) to (size * S + 1,)."""
    each = cu_seqlens if own else cu_seqlens.expand(size, -1)
    starts = torch.arange(size, dtype=each.dtype, device=each.device) * packed
    ends = (each[:, 1:] + starts.unsqueeze(1)).flatten()
    return torch.cat([each[0, :1], ends])


def samples(
    size: int, own: bool, x: Tensor, own_kept: bool, kept: Tensor, own_ends: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make the batch further samples of `x` (B, ...) and of `kept`, which is (B, K), or (T,) with `cu_seqlens`."""
    x, kept = rows(x, own, size), rows(kept, own_kept, size)
    if cu_seqlens is not None:
        cu_seqlens = boundaries(cu_seqlens, own_ends, size, kept.shape[0] // size)
    return x, kept, cu_seqlens
