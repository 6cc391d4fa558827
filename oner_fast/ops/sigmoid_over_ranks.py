"""sigmoid_loss over ranks: each rank's rows meet the keys of all ranks, in one block or in several.

`rank_blocks` says how keys travel. A term of this loss depends on one logit alone, so that forward sends nothing but
keys. Backward sends them again, and their gradients return to the owners of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.ops.rank_blocks import Block, Part, Parts, Ranks, Sum


@dataclass(frozen=True)
class Rows:
    """This rank's rows, in the form that the raw ops take."""

    raw: Any  # the raw ops
    query: tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # x, other, mix, inverse norms
    logit_scale: Tensor
    logit_bias: Tensor | None
    partner: Tensor | None  # (n,) global indices
    weight: Tensor | None  # (n,) of the partners
    query_code: Tensor | None  # (n,)
    key_code: Tensor | None  # (N,) of the keys of all ranks
    positive: bool

    @property
    def count(self) -> int:
        return self.query[0].shape[0]

    def against(self, ranks: Ranks, block: Block, keys: Tensor) -> tuple[Any, ...]:
        """Return the arguments that both raw ops begin with, for a block of keys."""
        partner = self.partner if self.partner is None or block.first == 0 else self.partner - block.first
        own = ranks.first(ranks.rank) - block.first
        return (*self.query, keys, None, None, None, self.logit_scale, self.logit_bias, partner, self.weight, own)

    def pairs(self, block: Block) -> tuple[Tensor | None, Tensor | None, bool]:
        """Return the arguments that both raw ops end with, for a block of keys."""
        code = self.key_code
        code = None if code is None else code.narrow(0, block.first, block.count)
        return self.query_code, code, self.positive


def sums(ranks: Ranks, rows: Rows, keys: Tensor) -> Tensor:
    """Compute forward: the sum of the terms of each of this rank's rows, over the keys of all ranks: (n,).

    `keys` (n, D) are this rank's, as they enter the logits.
    """
    total = keys.new_zeros(rows.count, dtype=statistics_dtype(keys))

    def work(block: Block, given: Parts) -> Parts:
        if rows.count and block.count:
            total.add_(rows.raw.sigmoid_loss_sums(*rows.against(ranks, block, given[Part.KEYS]), *rows.pairs(block)))
        return {}

    ranks.pass_around({Part.KEYS: keys}, {}, work, Sum())
    return total


@dataclass(frozen=True)
class Gradients:
    """Gradients of this rank's rows, summed over blocks, and of its keys, summed over ranks; float32 or wider."""

    query: Tensor  # (n, D)
    query_other: Tensor  # (n, D), empty without
    mix: Tensor  # (n,), the mix of each row; empty without
    logit_scale: Tensor  # ()
    logit_bias: Tensor  # ()
    keys: Tensor | None  # (n, D), None where no rank wants it


def gradients(ranks: Ranks, rows: Rows, keys: Tensor, each: Tensor, keys_wanted: bool) -> Gradients:
    """Compute backward: the keys meet the rows once more, and their gradients return to their owners.

    Args:
        ranks: the ranks.
        rows: this rank's rows.
        keys: (n, D), this rank's keys as they enter the logits.
        each: (1,), the gradient with respect to every term.
        keys_wanted: whether any rank needs the gradient of its keys.
    """
    x, other = rows.query[:2]
    none = each.new_zeros(0)
    found = (
        each.new_zeros(x.shape),
        none if other is None else each.new_zeros(x.shape),
        none if other is None else each.new_zeros(rows.count),
        each.new_zeros(()),
        each.new_zeros(()),
    )

    def work(block: Block, given: Parts) -> Parts:
        if rows.count == 0 or block.count == 0:
            return {}
        *of_rows, to_keys, _, _, to_scale, to_bias = rows.raw.sigmoid_loss_backward(
            *rows.against(ranks, block, given[Part.KEYS]), each, keys_wanted, True, *rows.pairs(block)
        )
        for so_far, one in zip(found, (*of_rows, to_scale, to_bias), strict=True):
            so_far += one
        return {Part.GRADIENTS: to_keys} if keys_wanted else {}

    behind = {Part.GRADIENTS: each.new_empty((0, keys.shape[1]))} if keys_wanted else {}
    home = ranks.pass_around({Part.KEYS: keys}, behind, work, Sum())
    return Gradients(*found, home.get(Part.GRADIENTS))
