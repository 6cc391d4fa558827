"""The contrastive loss over ranks: each rank's rows meet the keys of all ranks, in one block or in several.

The statistics of a block's columns, and the gradient of its keys, return to the owner of the keys, where those of all
ranks become one. `rank_blocks` says how both travel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.ops.rank_blocks import Block, Part, Parts, Ranks, Sum
from oner_fast.ops.same_ids import SamePairs

PartnerSums = Callable[[Tensor, Tensor, int], Tensor]  # (partner (n,), values (n,), columns) -> (columns,)


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


class _Columns:
    """Parts (n, 2 or 4) of the statistics of columns: maximum, sum of exp(x - maximum), and sums."""

    def take(self, total: Tensor, share: Tensor) -> None:
        _merge_sums(total[:, 0], total[:, 1], share[:, 0], share[:, 1])
        total[:, 2:] += share[:, 2:]

    def all(self, shares: Tensor) -> Tensor:
        highest = shares[..., 0].amax(0)
        sums = (shares[..., 1] * (shares[..., 0] - highest).exp_()).sum(0)
        return torch.cat([torch.stack([highest, sums], dim=1), shares[..., 2:].sum(0)], dim=1)


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

    def against(self, ranks: Ranks, block: Block, keys: Tensor) -> tuple[Any, ...]:
        """Return the arguments that statistics and backward share, for a block of keys."""
        partner = self.partner if self.partner is None or block.first == 0 else self.partner - block.first
        own = ranks.first(ranks.rank) - block.first
        return (*self.query, keys, None, None, None, self.logit_scale, partner, own)

    def same_in(self, block: Block) -> SamePairs | None:
        """Return the ids for a block of keys."""
        return None if self.same is None else self.same.block(block.first, block.count)

    def of_columns(self, partner: Tensor, values: Tensor, columns: int) -> Tensor:
        """For each column, sum the values of the rows whose partner is that column: (columns,).

        Partners are indices into the block.
        """
        inside = (partner >= 0) & (partner < columns)
        return self.partner_sums(partner.clamp(0, columns - 1), torch.where(inside, values, 0.0), columns)


def statistics(
    ranks: Ranks, rows: Rows, keys: Tensor, symmetric: bool
) -> tuple[RowStatistics, ColumnStatistics | None]:
    """Compute forward: this rank's rows against the keys of all ranks, and all ranks' rows against its columns."""
    wide = statistics_dtype(keys)
    of_rows: RowStatistics | None = None
    with_targets = symmetric and rows.partner is not None

    def work(block: Block, given: Parts) -> Parts:
        nonlocal of_rows
        if rows.count == 0 or block.count == 0:
            return {}
        arguments = rows.against(ranks, block, given[Part.KEYS])
        maximum, total, column_max, column_sum, own, shared = rows.raw.mixup_info_nce_statistics(
            *arguments, symmetric, *(rows.same_in(block) or ())
        )
        if of_rows is None:
            of_rows = RowStatistics(maximum, total, own, shared)
        else:
            of_rows.take(maximum, total, own, shared)
        if not symmetric:
            return {}
        found = [column_max, column_sum]
        if with_targets:
            assert rows.weight is not None
            partner, start = arguments[9:]
            target, mass = (rows.of_columns(partner, x, block.count) for x in (rows.weight * shared, rows.weight))
            if 0 <= start < block.count:  # this rank's own pairs are in the block
                target[start : start + rows.count] += (1 - rows.weight) * own
                mass[start : start + rows.count] += 1 - rows.weight
            found += [target, mass]
        return {Part.COLUMNS: torch.stack(found, dim=1)}

    behind = {Part.COLUMNS: keys.new_empty((0, 4 if with_targets else 2), dtype=wide)} if symmetric else {}
    home = ranks.pass_around({Part.KEYS: keys}, behind, work, _Columns())
    if of_rows is None:
        of_rows = RowStatistics(*(keys.new_empty(0, dtype=wide) for _ in range(4)))
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
    ranks: Ranks,
    rows: Rows,
    keys: Tensor,
    columns: Tensor | None,
    each: Tensor,
    row_max: Tensor,
    row_weight: Tensor,
    own_weight: Tensor,
    keys_wanted: bool,
) -> Gradients:
    """Compute backward: the keys meet the rows once more, and their gradients return to their owners.

    Args:
        ranks: the ranks.
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

    def work(block: Block, given: Parts) -> Parts:
        if rows.count == 0 or block.count == 0:
            return {}
        arguments = rows.against(ranks, block, given[Part.KEYS])
        partner_weight = None if rows.weight is None else each * rows.weight
        column_max = column_weight = None
        if columns is not None:
            column_max, column_sum, *inverse_mass = given[Part.COLUMNS].T.contiguous()
            column_weight = each / column_sum
            if partner_weight is not None:
                nearest = arguments[9].clamp(0, block.count - 1)  # a partner in another block has no term here
                partner_weight = partner_weight * (1 + inverse_mass[0].index_select(0, nearest))
        same = rows.same_in(block)
        *of_rows, to_keys, _, _, to_scale = rows.raw.mixup_info_nce_backward(
            *arguments, row_max, row_weight, column_max, column_weight, own_weight, partner_weight, keys_wanted, True,
            *(same.of_backward(each) if same else ()),
        )  # fmt: skip
        for so_far, one in zip(sums, (*of_rows, to_scale), strict=True):
            so_far += one
        return {Part.GRADIENTS: to_keys} if keys_wanted else {}

    ahead = {Part.KEYS: keys} if columns is None else {Part.KEYS: keys, Part.COLUMNS: columns}
    behind = {Part.GRADIENTS: each.new_empty((0, keys.shape[1]))} if keys_wanted else {}
    home = ranks.pass_around(ahead, behind, work, Sum())
    return Gradients(*sums, home.get(Part.GRADIENTS))
