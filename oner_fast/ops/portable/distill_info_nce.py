"""distill_info_nce in plain PyTorch: the logits of student and teacher exist for a few rows at a time.

For N pairs it holds one copy of each of the four sides in float32 (float64 for float64), five numbers for each row and
each column, and a few buffers of `PART_NUMBERS` numbers. Backward computes the logits again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from oner_fast.dtypes import statistics_dtype, widest_dtype
from oner_fast.ops.portable import parts

_LEAST_ROWS = 16  # of a part, however many columns there are


class _Logits:
    """The logits of student and teacher, a few rows at a time, in float32 or float64."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        logit_scale: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor,
        teacher_logit_scale: Tensor,
    ) -> None:
        wide = statistics_dtype(query)
        self.scale = logit_scale.to(query.device, wide)
        self.queries, self.keys = query.to(wide), key.to(wide)
        self.teacher_queries = teacher_query.to(wide) * teacher_logit_scale.to(query.device, wide)
        self.teacher_keys = teacher_key.to(wide)

    def parts(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows, and the logits [rows, N] of student and teacher, which the caller may overwrite."""
        rows, columns = self.queries.shape[0], self.keys.shape[0]
        for part in parts(rows if columns else 0, columns, _LEAST_ROWS):
            student = (self.queries[part] * self.scale) @ self.keys.T
            yield part, student, self.teacher_queries[part] @ self.teacher_keys.T


def statistics(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_logit_scale: Tensor,
    columns_too: bool,
) -> tuple[Tensor, Tensor]:
    """Compute forward: five numbers for each row (5, n), and for each column (5, N), or (5, 0)."""
    given = _Logits(query, key, logit_scale, teacher_query, teacher_key, teacher_logit_scale)
    rows = given.queries.new_zeros((5, query.shape[0]))
    columns = given.queries.new_zeros((5, key.shape[0] if columns_too else 0))
    columns[[0, 2]] = -torch.inf
    for part, student, teacher in given.parts():
        high, teacher_high = student.amax(1, keepdim=True), teacher.amax(1, keepdim=True)
        weights = (teacher - teacher_high).exp_()
        rows[0, part], rows[2, part] = high.squeeze(1), teacher_high.squeeze(1)
        rows[1, part], rows[3, part] = (student - high).exp_().sum(1), weights.sum(1)
        rows[4, part] = weights.mul_(student).sum(1)
        if columns_too:
            high, teacher_high = torch.maximum(columns[0], student.amax(0)), torch.maximum(columns[2], teacher.amax(0))
            columns[1] *= (columns[0] - high).exp_()
            columns[1] += (student - high).exp_().sum(0)
            columns[3:] *= (columns[2] - teacher_high).exp_()
            weights = teacher.sub_(teacher_high).exp_()
            columns[3] += weights.sum(0)
            columns[4] += weights.mul_(student).sum(0)
            columns[0], columns[2] = high, teacher_high
    return rows, columns


def backward(
    query: Tensor,
    key: Tensor,
    logit_scale: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    teacher_logit_scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    weight: Tensor,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute backward: the gradients of query, key and logit_scale, where each row's term has the factor `weight`."""
    given = _Logits(query, key, logit_scale, teacher_query, teacher_key, teacher_logit_scale)
    to_queries = given.queries.new_zeros(query.shape)
    to_keys = given.keys.new_zeros(key.shape if need_key else 0)
    for part, student, teacher in given.parts():
        gradient = _share(student, rows[:, part].unsqueeze(2), 0).sub_(_share(teacher, rows[:, part].unsqueeze(2), 2))
        if columns.shape[1]:
            gradient += _share(student, columns.unsqueeze(1), 0).sub_(_share(teacher, columns.unsqueeze(1), 2))
        gradient *= weight
        torch.mm(gradient, given.keys, out=to_queries[part])
        if need_key:
            to_keys.addmm_(gradient.T, given.queries[part])
    to_scale = (given.queries * to_queries).sum(dtype=widest_dtype(query.device)).to(to_queries.dtype)
    return (
        to_queries.mul_(given.scale).to(query.dtype),
        to_keys.mul_(given.scale).to(key.dtype) if need_key else to_keys,
        to_scale,
    )


def _share(logits: Tensor, statistics: Tensor, first: int) -> Tensor:
    """Return the softmax [rows, N] of logits, given their maximum and sum from `first` on in statistics (5, ., .)."""
    return (logits - statistics[first]).exp_().div_(statistics[first + 1])
