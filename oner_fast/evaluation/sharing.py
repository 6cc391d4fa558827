"""Share the embedding of images and texts between the ranks of a process group.

The work is cut into batches that do not depend on the number of ranks. Rank r takes the batches r, r + size, and so on,
so that a batch holds the same items whoever embeds it. Every rank gets all results, in the order of the batches, and
computes all figures from them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
import torch.distributed as dist

from oner_fast.process_group import World

T = TypeVar("T")

_ALONE = World(0, 1, 0, torch.device("cpu"))
_WORLD: ContextVar[World] = ContextVar("world", default=_ALONE)
_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def shared(world: World, *, quiet: bool = False) -> Iterator[None]:
    """Share the work inside between the ranks of `world`; each of them must do the same work inside.

    Args:
        quiet: show no progress and no warnings, for a command with a display of its own.
    """
    tokens = _WORLD.set(world), _QUIET.set(quiet)
    try:
        yield
    finally:
        _WORLD.reset(tokens[0])
        _QUIET.reset(tokens[1])


def speaks() -> bool:
    """Tell whether this process shows progress and warnings: rank 0 does, and a process alone, unless `quiet`."""
    return _WORLD.get().is_main and not _QUIET.get()


def mine(batches: int) -> range:
    """Return the numbers of the batches that this rank takes."""
    world = _WORLD.get()
    return range(world.rank, batches, world.size)


def gathered(found: Sequence[T], batches: int) -> list[T]:
    """Return the results of all batches, in their order, on every rank.

    Args:
        found: the results of the batches `mine(batches)`, in their order. They are pickled.
        batches: the number of all batches.
    """
    world = _WORLD.get()
    if world.size == 1:
        return list(found)
    of_rank: list[list[T]] = [[] for _ in range(world.size)]
    dist.all_gather_object(of_rank, list(found))
    return [of_rank[number % world.size][number // world.size] for number in range(batches)]
