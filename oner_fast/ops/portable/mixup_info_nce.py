"""mixup_info_nce in plain PyTorch: the logits exist for a few rows at a time, in forward and again in backward.

For N pairs of D numbers it holds two copies of each side in float32 (float64 for float64) beside inputs and results,
and a few buffers of `PART_NUMBERS` numbers. Backward computes the same products as forward, so that the largest logit
has an exponential of exactly 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oner_fast.dtypes import widest_dtype
from oner_fast.ops.portable import add_rows, parts
from oner_fast.ops.unit_rows import inverse_norms as _inverse_norms
from oner_fast.ops.unit_rows import through_normalisation, unit_rows

_LEAST_ROWS = 16  # of a part, however many columns there are
_IGNORED = -1e38  # the logit of an ignored pair: its exponential is 0, and no difference of two of these is NaN


def inverse_norms(x: Tensor, other: Tensor | None, mix: Tensor | None) -> Tensor:
    """Return 1 / norm of the mixed rows: (N,)."""
    return _inverse_norms(x, other, 0.0 if mix is None else mix)


def partner_sums(partner: Tensor, values: Tensor, columns: int) -> Tensor:
    """For each column, sum the values (n,) of the rows whose partner is that column: (columns,)."""
    sums = values.new_zeros(columns)
    add_rows(sums, partner, values)
    return sums


class Operands:
    """Both sides as `unit_rows` in float32 or float64, the queries times logit_scale."""

    def __init__(
        self,
        query: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
        key: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
        logit_scale: Tensor,
        partner: Tensor | None,
        first_pair: int,
    ) -> None:
        x, other, mix, inverse_norm = query
        self.query, self.key = query, key
        self.keys = unit_rows(key[0], key[1], 0.0 if key[2] is None else key[2], key[3])
        self.scale = logit_scale.to(self.keys.dtype)
        factor = self.scale.expand(x.shape[0]) if inverse_norm is None else inverse_norm * self.scale
        self.queries = unit_rows(x, other, 0.0 if mix is None else mix, factor)
        self.partner, self.first_pair = partner, first_pair
        self.rows, self.columns = self.queries.shape[0], self.keys.shape[0]

    def marked(self, part: slice, query_code: Tensor, key_code: Tensor, *, own: bool) -> Tensor:
        """Say which pairs [rows of the part, N] have equal codes; where `own`, own pairs too, else these never."""
        diagonal = self.own(part).unsqueeze(1) == torch.arange(self.columns, device=self.keys.device)
        equal = query_code[part].unsqueeze(1) == key_code
        return equal | diagonal if own else equal & ~diagonal

    def parts(self) -> list[slice]:
        return list(parts(self.rows if self.columns else 0, self.columns, _LEAST_ROWS))

    def logits(self, part: slice) -> Tensor:
        return self.queries[part] @ self.keys.T  # [rows of the part, N]

    def own(self, part: slice) -> Tensor:
        """Return the column of each row's own pair, which may lie outside of all columns."""
        return torch.arange(part.start, part.stop, device=self.keys.device) + self.first_pair

    def at(self, logits: Tensor, column: Tensor) -> Tensor:
        """Return the logit of each row at its column, or 0 where the column lies outside."""
        inside = (column >= 0) & (column < self.columns)
        found = logits.gather(1, column.clamp(0, self.columns - 1).unsqueeze(1)).squeeze(1)
        return torch.where(inside, found, 0.0)

    def add(self, matrix: Tensor, column: Tensor, weight: Tensor) -> None:
        """Add the weight of each row at its column, in place; nothing where the column lies outside."""
        inside = (column >= 0) & (column < self.columns)
        share = torch.where(inside, weight, 0.0).unsqueeze(1)
        matrix.scatter_add_(1, column.clamp(0, self.columns - 1).unsqueeze(1), share)

    def results(self, to_queries: Tensor, to_keys: Tensor, need_key: bool, key_sums: bool) -> tuple[Tensor, ...]:
        """Return the gradients of both sides and of logit_scale from the sums of G times the rows of the other side.

        The sums and the queries are overwritten.
        """
        x, other, mix, inverse_norm = self.query
        unit = unit_rows(x, other, 0.0 if mix is None else mix, inverse_norm)
        products = torch.mul(unit, to_queries, out=self.queries)  # `unit` may be the input itself
        to_scale = products.sum(dtype=widest_dtype(unit.device)).to(unit.dtype)
        # The queries of the products carry the scale already, and so do the sums of the keys.
        queries = _finished(to_queries.mul_(self.scale), *self.query)
        if not need_key:
            keys = [to_keys, to_keys.clone(), to_keys.clone()]
        elif key_sums:
            keys = [to_keys, to_keys.new_empty(0), to_keys.new_empty(0)]
        else:
            keys = _finished(to_keys, *self.key)
        return (*queries, *keys, to_scale)


def statistics(
    query: Tensor,
    query_other: Tensor | None,
    query_mix: Tensor | None,
    query_inverse_norm: Tensor | None,
    key: Tensor,
    key_other: Tensor | None,
    key_mix: Tensor | None,
    key_inverse_norm: Tensor | None,
    logit_scale: Tensor,
    partner: Tensor | None,
    first_pair: int,
    columns_too: bool,
    query_code: Tensor | None = None,
    key_code: Tensor | None = None,
    row_share: Tensor | None = None,
    column_share: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute forward: the maximum and sum of each row and column, and the logits of own pairs and partners."""
    given = Operands(
        (query, query_other, query_mix, query_inverse_norm), (key, key_other, key_mix, key_inverse_norm), logit_scale,
        partner, first_pair,
    )  # fmt: skip
    like, columns = given.keys, given.columns if columns_too else 0
    row_max, row_sum = like.new_full((given.rows,), -torch.inf), like.new_zeros(given.rows)
    column_max, column_sum = like.new_full((columns,), -torch.inf), like.new_zeros(columns)
    own, shared = like.new_zeros(given.rows), like.new_zeros(0 if partner is None else given.rows)
    for part in given.parts():
        logits = given.logits(part)
        if query_code is None or key_code is None:
            own[part] = given.at(logits, given.own(part))
        elif row_share is None or column_share is None:
            own[part] = given.at(logits, given.own(part))
            logits.masked_fill_(given.marked(part, query_code, key_code, own=False), _IGNORED)
        else:
            share = row_share[part].unsqueeze(1) + column_share
            targets = given.marked(part, query_code, key_code, own=True)
            own[part] = torch.where(targets, share.mul_(logits), 0.0).sum(1)
        if partner is not None:
            shared[part] = given.at(logits, partner[part])
        row_max[part] = high = logits.amax(1)
        row_sum[part] = (logits - high.unsqueeze(1)).exp_().sum(1)
        if columns_too:
            high = torch.maximum(column_max, logits.amax(0))
            column_sum *= (column_max - high).exp_()
            column_sum += logits.sub_(high).exp_().sum(0)
            column_max = high
    return row_max, row_sum, column_max, column_sum, own, shared


def backward(
    query: Tensor,
    query_other: Tensor | None,
    query_mix: Tensor | None,
    query_inverse_norm: Tensor | None,
    key: Tensor,
    key_other: Tensor | None,
    key_mix: Tensor | None,
    key_inverse_norm: Tensor | None,
    logit_scale: Tensor,
    partner: Tensor | None,
    first_pair: int,
    row_max: Tensor,
    row_weight: Tensor,
    column_max: Tensor | None,
    column_weight: Tensor | None,
    own_weight: Tensor,
    partner_weight: Tensor | None,
    need_key: bool,
    key_sums: bool,
    query_code: Tensor | None = None,
    key_code: Tensor | None = None,
    column_share: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute backward: the gradients of x, other and mix of both sides, and that of logit_scale."""
    given = Operands(
        (query, query_other, query_mix, query_inverse_norm), (key, key_other, key_mix, key_inverse_norm), logit_scale,
        partner, first_pair,
    )  # fmt: skip
    to_queries = given.queries.new_zeros(query.shape)
    to_keys = given.keys.new_zeros(key.shape if need_key else 0)
    for part in given.parts():
        logits = given.logits(part)
        gradient = (logits - row_max[part].unsqueeze(1)).exp_().mul_(row_weight[part].unsqueeze(1))
        if column_max is not None and column_weight is not None:
            gradient.addcmul_(logits.sub_(column_max).exp_(), column_weight)
        if query_code is not None and key_code is not None and column_share is not None:
            share = own_weight[part].unsqueeze(1) + column_share
            gradient -= torch.where(given.marked(part, query_code, key_code, own=True), share, 0.0)
        else:
            if query_code is not None and key_code is not None:
                gradient.masked_fill_(given.marked(part, query_code, key_code, own=False), 0.0)
            given.add(gradient, given.own(part), -own_weight[part])
        if partner is not None and partner_weight is not None:
            given.add(gradient, partner[part], -partner_weight[part])
        torch.mm(gradient, given.keys, out=to_queries[part])
        if need_key:
            to_keys.addmm_(gradient.T, given.queries[part])
    return given.results(to_queries, to_keys, need_key, key_sums)


def _finished(
    gradient: Tensor, x: Tensor, other: Tensor | None, mix: Tensor | None, inverse_norm: Tensor | None
) -> list[Tensor]:
    """Return the gradients of x, other and mix, part by part; empty where the side has none."""
    wide = gradient.dtype
    share = gradient.new_zeros(()) if mix is None else mix.to(wide)
    found = [
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(0) if other is None else torch.empty_like(other, memory_format=torch.contiguous_format),
        gradient.new_empty(0 if other is None else x.shape[0]),
    ]
    for part in parts(x.shape[0], x.shape[1]):
        some = None if other is None else other[part]
        through = through_normalisation(
            gradient[part], x[part], some, share[part] if share.ndim else share,
            None if inverse_norm is None else inverse_norm[part],
        )  # fmt: skip
        for to, one in zip(found, through, strict=True):
            if one is not None:
                to[part] = one
    return found
