"""Blocks of keys that meet the rows of every rank: gathered at once where they are small, else passed around a ring.

Every rank of a group computes something with its rows and the keys of all ranks, and owns what all of them compute for
its own keys. `Gathered` needs two exchanges, whatever the number of ranks, and holds all keys. `Ring` needs as many
exchanges as there are ranks, hides them behind the work on a block, and holds two blocks of keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from oner_fast.ops.collectives import gather_rows_without_gradient

GATHER_BELOW = 64 * 2**20
"""Bytes of the keys of all ranks up to which they are gathered (our choice)."""


class Part(IntEnum):
    """The content of a message, used as its tag (NCCL has no tags and goes by the order)."""

    KEYS = 0
    COLUMNS = 1  # in forward their statistics, in backward the numbers that their gradient needs
    GRADIENTS = 2


Parts = dict[Part, Tensor]


@dataclass(frozen=True)
class Block:
    """A range of the keys of all ranks, by global index."""

    first: int
    count: int


Work = Callable[[Block, Parts], Parts]


class Merge(Protocol):
    """A way to make one part of those that the ranks computed for the same keys."""

    def take(self, total: Tensor, share: Tensor) -> object:
        """Add a rank's part (n, ...) to the total (n, ...), in place."""

    def all(self, shares: Tensor) -> Tensor:
        """Merge the parts of all ranks (ranks, n, ...): (n, ...)."""


class Sum:
    """Parts that are added."""

    def take(self, total: Tensor, share: Tensor) -> None:
        total += share

    def all(self, shares: Tensor) -> Tensor:
        return shares.sum(0)


@dataclass(frozen=True)
class Ranks(ABC):
    """The ranks of a group in their order, and how many rows each holds."""

    sizes: tuple[int, ...]
    group: dist.ProcessGroup

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def first(self, owner: int) -> int:
        """The global index of a rank's first row."""
        return sum(self.sizes[:owner])

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the (n, ...) tensors of all ranks in their order, without a gradient."""
        return gather_rows_without_gradient(rows, self.sizes, self.group)

    @abstractmethod
    def pass_around(self, ahead: Parts, behind: Parts, work: Work, merge: Merge) -> Parts:
        """Let every rank work on the keys of all ranks, and return what all of them computed for this rank's own.

        Every tensor has one row for each row of its block.

        Args:
            ahead: the tensors of this rank's keys that the other ranks need.
            behind: empty tensors (0 rows) with the shapes and dtypes of what a rank computes for a block.
            work: (block, its tensors of `ahead`) -> what this rank computes for the block; empty where either side has
                no rows.
            merge: makes one part of those that the ranks computed.
        """


@dataclass(frozen=True)
class Gathered(Ranks):
    """All keys are gathered, and one exchange brings the parts of every rank to the owners of the keys."""

    def pass_around(self, ahead: Parts, behind: Parts, work: Work, merge: Merge) -> Parts:
        found = work(Block(0, self.total), {part: self.gather(x) for part, x in ahead.items()})
        return {part: merge.all(self._shares(found.get(part), like)) for part, like in behind.items()}

    def _shares(self, found: Tensor | None, like: Tensor) -> Tensor:
        """Send every rank what was found for its keys; return what ranks with rows found for these: (ranks, n, ...).

        `found` (N, ...) is None on a rank without rows.
        """
        own, shape = self.sizes[self.rank], like.shape[1:]
        sent = [0] * self.world if found is None else list(self.sizes)
        received = [own if size else 0 for size in self.sizes]
        room = like.new_empty((sum(received), *shape))
        leaving = like if found is None else found.contiguous()
        dist.all_to_all_single(room, leaving, received, sent, group=self.group)
        return room.view(sum(size > 0 for size in self.sizes), own, *shape)


@dataclass(frozen=True)
class Ring(Ranks):
    """At step s, rank r works on the keys of rank r - s (mod W).

    Meanwhile it receives the next block from rank r - 1 and sends this one to rank r + 1. What is computed for a block
    travels one step behind it and reaches its owner after W steps. A rank therefore holds its own keys, two travelling
    blocks and three gradients of blocks, however many ranks there are. Every sum is taken in the order of the ring,
    whatever arrives first.
    """

    def owner(self, step: int) -> int:
        """The rank whose keys this rank works on at a step."""
        return (self.rank - step) % self.world

    def exchange(self, leaving: Parts, arriving: Parts) -> list[dist.Work]:
        """Start to send to the next rank and to receive from the one before; both sides skip empty tensors."""
        after, before = (self.rank + 1) % self.world, (self.rank - 1) % self.world
        messages = [
            dist.P2POp(way, x, group=self.group, group_peer=peer, tag=int(part))
            for way, peer, parts in ((dist.isend, after, leaving), (dist.irecv, before, arriving))
            for part, x in parts.items()
            if x.numel()
        ]
        return dist.batch_isend_irecv(messages) if messages else []

    def pass_around(self, ahead: Parts, behind: Parts, work: Work, merge: Merge) -> Parts:
        found: Parts = {}
        for step in range(self.world):
            owner = self.owner(step)
            following = self._room(ahead, self.owner(step + 1)) if step < self.world - 1 else {}
            arriving = self._room(behind, owner) if step > 0 else {}
            posted = self.exchange({**(ahead if following else {}), **found}, {**following, **arriving})
            found = work(Block(self.first(owner), self.sizes[owner]), ahead)
            _wait(posted)
            for part in arriving.keys() & found.keys():
                merge.take(arriving[part], found[part])
            ahead, found = following, arriving if step > 0 else found
        if self.world > 1:
            arriving = self._room(behind, self.rank)
            _wait(self.exchange(found, arriving))
            found = arriving
        return found

    def _room(self, like: Parts, owner: int) -> Parts:
        """Allocate tensors like these for the rows of another rank."""
        return {part: x.new_empty((self.sizes[owner], *x.shape[1:])) for part, x in like.items()}


def ranks_of(sizes: tuple[int, ...], group: dist.ProcessGroup, bytes_of_a_key: int) -> Ranks:
    """Return the ranks, whose keys are gathered where all of them take at most `GATHER_BELOW` bytes.

    The choice needs nothing but what every rank knows.
    """
    small = sum(sizes) * bytes_of_a_key <= GATHER_BELOW
    return (Gathered if small and len(sizes) > 1 else Ring)(sizes, group)


def _wait(posted: list[dist.Work]) -> None:
    """Wait for all messages, and drop the references to what was sent."""
    while posted:
        posted.pop(0).wait()
