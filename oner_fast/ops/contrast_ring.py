"""The contrastive loss over ranks as a ring: each rank's rows meet the keys of all ranks, one block after the other.

At step s, rank r works on the keys of rank r - s (mod W). Meanwhile it receives the next block from rank r - 1 and
sends this one to rank r + 1. The statistics of a block's columns, and the gradient of its keys, travel one step behind
the block and reach their owner after W steps. A rank therefore holds its own keys, two travelling blocks and three
gradients of blocks, however many ranks there are. Every sum is taken in the order of the ring, whatever arrives first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.ops.collectives import gather_rows_without_gradient
from oner_fast.ops.same_ids import SamePairs

PartnerSums = Callable[[Tensor, Tensor, int], Tensor]  # (partner (n,), values (n,), columns) -> (columns,)


class Part(IntEnum):
    """The content of a message, used as its tag (NCCL has no tags and goes by the order)."""

    KEYS = 0
    COLUMNS = 1  # in forward their statistics, in backward the numbers that their gradient needs
    GRADIENTS = 2


Parts = dict[Part, Tensor]


@dataclass(frozen=True)
class Ring:
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

    def owner(self, step: int) -> int:
        """The rank whose keys this rank works on at a step."""
        return (self.rank - step) % self.world

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the (n, ...) tensors of all ranks in their order, without a gradient."""
        return gather_rows_without_gradient(rows, self.sizes, self.group)

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

    def pass_around(
        self,
        ahead: Parts,
        behind: Parts,
        work: Callable[[int, Parts], Parts],
        merge: Callable[[Tensor, Tensor], object],
    ) -> Parts:
        """Pass every rank's block around the ring and return what all ranks computed for this rank's own.

        Every tensor has one row for each row of its block.

        Args:
            ahead: the tensors of this rank's block that the other ranks need.
            behind: empty tensors (0 rows) with the shapes and dtypes of what a rank computes for a block.
            work: (owner, the tensors it sent ahead) -> what this rank computes for that block; empty where either side
                has no rows.
            merge: (total of the ranks before, this rank's part) -> None; adds the part to the total in place.
        """
        found: Parts = {}
        for step in range(self.world):
            owner = self.owner(step)
            following = self._room(ahead, self.owner(step + 1)) if step < self.world - 1 else {}
            arriving = self._room(behind, owner) if step > 0 else {}
            posted = self.exchange({**(ahead if following else {}), **found}, {**following, **arriving})
            found = work(owner, ahead)
            _wait(posted)
            for part in arriving.keys() & found.keys():
                merge(arriving[part], found[part])
            ahead, found = following, arriving if step > 0 else found
        if self.world > 1:
            arriving = self._room(behind, self.rank)
            _wait(self.exchange(found, arriving))
            found = arriving
        return found

    def _room(self, like: Parts, owner: int) -> Parts:
        """Allocate tensors like these for the rows of another rank."""
        return {part: x.new_empty((self.sizes[owner], *x.shape[1:])) for part, x in like.items()}


def _wait(posted: list[dist.Work]) -> None:
    """Wait for all messages, and drop the references to what was sent."""
    while posted:
        posted.pop(0).wait()


@dataclass
class RowStatistics:
    """Statistics of this rank's rows over the columns of all blocks so far."""

    maximum: Tensor  # (n,)
    total: Tensor  # (n,) sum of exp(logit - maximum)
    own: Tensor  # (n,) logit of a row's own pair
    shared: Tensor  # (n,) logit of its partner, empty without

    def take(self, maximum: Tensor, total: Tensor, own: Tensor, shared: Tensor) -> None:
        """Add the statistics of another block; own and shared are 0 for pairs outside it."""
        _merge_sums(self.maximum, self.total, maximum, total)
        self.own += own
        self.shared += shared


@dataclass(frozen=True)
class ColumnStatistics:
    """Statistics of this rank's columns over the rows of all ranks, (n,) each."""

    maximum: Tensor
    total: Tensor
    target: Tensor | None  # weighted sum of the logits of its targets; None: only its own pair's
    mass: Tensor | None  # sum of the weights


def _merge_sums(maximum: Tensor, total: Tensor, other_maximum: Tensor, other_total: Tensor) -> None:
    """Merge the second maximum and sum of exp(x - maximum) into the first, in place."""
    highest = torch.maximum(maximum, other_maximum)
    total *= (maximum - highest).exp_()
    total += other_total * (other_maximum - highest).exp_()
    maximum.copy_(highest)


@dataclass(frozen=True)
class Rows:
    """This rank's rows, in the form that the raw ops take."""

    raw: Any  # the raw ops
    query: tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # x, other, mix, inverse norms
    logit_scale: Tensor
    partner: Tensor | None  # (n,) global indices
    weight: Tensor | None  # (n,) of the partners
    partner_sums: PartnerSums
    same: SamePairs | None  # this rank's queries and the keys of all ranks

    @property
    def count(self) -> int:
        return self.query[0].shape[0]

    def against(self, ring: Ring, owner: int, keys: Tensor) -> tuple[Any, ...]:
        """Return the arguments that statistics and backward share, for the keys of the rank `owner`."""
        first = ring.first(owner)
        partner = None if self.partner is None else self.partner - first
        return (*self.query, keys, None, None, None, self.logit_scale, partner, ring.first(ring.rank) - first)

    def same_in(self, ring: Ring, owner: int) -> SamePairs | None:
        """Return the ids for the keys of the rank `owner`."""
        return None if self.same is None else self.same.block(ring.first(owner), ring.sizes[owner])

    def of_columns(self, partner: Tensor, values: Tensor, columns: int) -> Tensor:
        """For each column, sum the values of the rows whose partner is that column: (columns,).

        Partners are indices into the block.
        """
        inside = (partner >= 0) & (partner < columns)
        return self.partner_sums(partner.clamp(0, columns - 1), torch.where(inside, values, 0.0), columns)


def statistics(ring: Ring, rows: Rows, keys: Tensor, symmetric: bool) -> tuple[RowStatistics, ColumnStatistics | None]:
    """Compute forward: this rank's rows against the keys of all ranks, and all ranks' rows against its columns."""
    wide = statistics_dtype(keys)
    empty = keys.new_empty(0, dtype=wide)
    of_rows = RowStatistics(empty, empty, empty, empty)
    with_targets = symmetric and rows.partner is not None

    def work(owner: int, block: Parts) -> Parts:
        nonlocal of_rows
        columns = block[Part.KEYS].shape[0]
        if rows.count == 0 or columns == 0:
            return {}
        arguments = rows.against(ring, owner, block[Part.KEYS])
        maximum, total, column_max, column_sum, own, shared = rows.raw.mixup_info_nce_statistics(
            *arguments, symmetric, *(rows.same_in(ring, owner) or ())
        )
        if owner == ring.rank:
            of_rows = RowStatistics(maximum, total, own, shared)
        else:
            of_rows.take(maximum, total, own, shared)
        if not symmetric:
            return {}
        found = [column_max, column_sum]
        if with_targets:
            assert rows.weight is not None
            partner = arguments[9]
            target, mass = (rows.of_columns(partner, x, columns) for x in (rows.weight * shared, rows.weight))
            if owner == ring.rank:
                target, mass = target + (1 - rows.weight) * own, mass + (1 - rows.weight)
            found += [target, mass]
        return {Part.COLUMNS: torch.stack(found, dim=1)}

    def merge(found: Tensor, share: Tensor) -> None:
        _merge_sums(found[:, 0], found[:, 1], share[:, 0], share[:, 1])
        found[:, 2:] += share[:, 2:]

    behind = {Part.COLUMNS: keys.new_empty((0, 4 if with_targets else 2), dtype=wide)} if symmetric else {}
    home = ring.pass_around({Part.KEYS: keys}, behind, work, merge)
    if not symmetric:
        return of_rows, None
    columns = home[Part.COLUMNS] if rows.count else behind[Part.COLUMNS]
    parts = [x.contiguous() for x in columns.unbind(1)]
    return of_rows, ColumnStatistics(*parts, *([] if with_targets else [None, None]))


@dataclass(frozen=True)
class Gradients:
    """Gradients of this rank's rows, summed over blocks, and of its keys, summed over ranks; float32 or wider."""

    query: Tensor  # (n, D)
    query_other: Tensor  # (n, D), empty without
    mix: Tensor  # (n,), the mix of each row; empty without
    logit_scale: Tensor  # ()
    keys: Tensor | None  # (n, D), None where no rank wants it


def gradients(
    ring: Ring,
    rows: Rows,
    keys: Tensor,
    columns: Tensor | None,
    each: Tensor,
    row_max: Tensor,
    row_weight: Tensor,
    own_weight: Tensor,
    keys_wanted: bool,
) -> Gradients:
    """Compute backward: the keys pass around the ring once more, and their gradients return to their owners.

    Args:
        ring: the ranks.
        rows: this rank's rows.
        keys: (n, D), this rank's keys as they enter the logits.
        columns: (n, 2 or 3), for each of this rank's columns its maximum, its sum (infinite where a column has no mass)
            and, with partners, 1 / mass (0 there). None where the loss has no column term.
        each: (), the factor common to all gradients with respect to logits.
        row_max: (n,), the largest logit of each row.
        row_weight: (n,), the factor of each row's exponentials.
        own_weight: (n,), the factor of each row's own pair.
        keys_wanted: whether any rank needs the gradient of its keys.
    """
    x, other = rows.query[:2]
    none = each.new_zeros(0)
    sums = (
        each.new_zeros(x.shape),
        none if other is None else each.new_zeros(x.shape),
        none if other is None else each.new_zeros(rows.count),
        each.new_zeros(()),
    )

    def work(owner: int, block: Parts) -> Parts:
        count = block[Part.KEYS].shape[0]
        if rows.count == 0 or count == 0:
            return {}
        arguments = rows.against(ring, owner, block[Part.KEYS])
        partner_weight = None if rows.weight is None else each * rows.weight
        column_max = column_weight = None
        if columns is not None:
            column_max, column_sum, *inverse_mass = block[Part.COLUMNS].T.contiguous()
            column_weight = each / column_sum
            if partner_weight is not None:
                nearest = arguments[9].clamp(0, count - 1)  # a partner in another block has no term here
                partner_weight = partner_weight * (1 + inverse_mass[0].index_select(0, nearest))
        same = rows.same_in(ring, owner)
        *of_rows, to_keys, _, _, to_scale = rows.raw.mixup_info_nce_backward(
            *arguments, row_max, row_weight, column_max, column_weight, own_weight, partner_weight, keys_wanted, True,
            *(same.of_backward(each) if same else ()),
        )  # fmt: skip
        for so_far, one in zip(sums, (*of_rows, to_scale), strict=True):
            so_far += one
        return {Part.GRADIENTS: to_keys} if keys_wanted else {}

    ahead = {Part.KEYS: keys} if columns is None else {Part.KEYS: keys, Part.COLUMNS: columns}
    behind = {Part.GRADIENTS: each.new_empty((0, keys.shape[1]))} if keys_wanted else {}
    home = ring.pass_around(ahead, behind, work, Tensor.add_)
    return Gradients(*sums, home.get(Part.GRADIENTS))
