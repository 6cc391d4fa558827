"""Pairs of rows with the same id, in the form that the kernels of mixup_info_nce compare.

Ids are any int64. The kernels get int32 codes instead: two codes are equal exactly where the ids are equal and not -1.
They compare the codes of a tile's rows with those of its columns, so that nothing is N x N. Codes and counts take two
sorts of the ids, and nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from oner_fast.dtypes import statistics_dtype

UNIQUE = -1  # the id that equals no id, itself included


class SamePairs(NamedTuple):
    """Codes of this rank's n queries and of the N keys of all ranks; the shares are None where such pairs are ignored.

    A positive pair (i, j) has the weight row_share[i] + column_share[j] in the sum of the two directions.
    """

    query_code: Tensor  # (n,) int32
    key_code: Tensor  # (N,) int32
    row_share: Tensor | None  # (n,) 1 / number of row i's positives
    column_share: Tensor | None  # (N,) 1 / number of column j's positives, or 0 where the loss has no column term

    def block(self, first: int, count: int) -> SamePairs:
        """Return the same for the `count` keys from `first` on."""
        share = None if self.column_share is None else self.column_share.narrow(0, first, count)
        return self._replace(key_code=self.key_code.narrow(0, first, count), column_share=share)

    def of_backward(self, each: Tensor) -> tuple[Tensor | None, ...]:
        """Return the arguments of the raw op of backward; row shares are weights of own pairs there."""
        return self.query_code, self.key_code, None if self.column_share is None else each * self.column_share


def same_pairs(
    query: Tensor,
    query_ids: Tensor,
    key_ids: Tensor | None,
    *,
    positive: bool,
    symmetric: bool,
    gather: Callable[[Tensor], Tensor] | None = None,
    first: int = 0,
) -> SamePairs:
    """Compute the codes and the shares of this rank's queries and of all keys.

    Args:
        query: the queries, (n, D), which choose the dtype of the shares.
        query_ids: (n,) int64.
        key_ids: (n,) int64; None: the keys have the ids of the queries.
        positive: further keys with the id of a row are targets, else they are ignored.
        symmetric: the loss has a column term.
        gather: concatenates the rows of all ranks; None: there is one rank.
        first: the global index of this rank's first row.
    """
    query_ids = query_ids.contiguous()
    key_ids = query_ids if key_ids is None else key_ids.contiguous()
    rows = query_ids.shape[0]
    if gather is not None:
        query_ids, key_ids = gather(torch.stack([query_ids, key_ids], dim=1)).T.contiguous().unbind()
    sorted_keys = key_ids.sort().values
    query_code = _codes(sorted_keys, query_ids, -1)
    key_code = _codes(sorted_keys, key_ids, -2)
    mine = query_code.narrow(0, first, rows)  # a slice of fake CUDA tensors needs a PyTorch with CUDA
    if not positive:
        return SamePairs(mine, key_code, None, None)
    dtype = statistics_dtype(query)
    alone = query_code != key_code  # the pair's own ids differ, or are unique: its own key is one more target
    row_share = _share(sorted_keys, query_ids, alone, dtype)
    if symmetric:
        column_share = _share(query_ids.sort().values, key_ids, alone, dtype)
    else:
        column_share = torch.zeros_like(row_share)
    return SamePairs(mine, key_code, row_share.narrow(0, first, rows), column_share)


def _codes(sorted_ids: Tensor, ids: Tensor, unique: int) -> Tensor:
    """Return for each id the place where it begins in the sorted ids, and `unique` where it is not there, or is -1."""
    place = torch.searchsorted(sorted_ids, ids)
    found = sorted_ids.gather(0, place.clamp(max=sorted_ids.shape[0] - 1)) == ids
    return torch.where(found & (ids != UNIQUE), place, unique).to(torch.int32)


def _share(sorted_ids: Tensor, ids: Tensor, alone: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 / (how many sorted ids equal each id, and one more where it stands alone)."""
    count = torch.searchsorted(sorted_ids, ids, right=True) - torch.searchsorted(sorted_ids, ids)
    count = torch.where(ids == UNIQUE, 0, count) + alone
    return 1 / count.to(dtype)
