"""token_alignment in plain PyTorch: the rows of a few tokens at a time, and two numbers for each token kept.

The two numbers are the inverse norms of the student's row and of the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from oner_fast.dtypes import statistics_dtype, widest_dtype
from oner_fast.ops.portable import parts
from oner_fast.ops.unit_rows import inverse_norms


def _rows(
    student: Tensor, teacher: Tensor, kept: Tensor | None
) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
    """Yield samples and tokens, and their rows of student and teacher in the dtype of statistics."""
    samples, tokens, width = student.shape
    dtype = statistics_dtype(student)
    for some in parts(samples, tokens * width):
        for few in parts(tokens, (some.stop - some.start) * width):
            if kept is None:
                target = teacher[some, few]
            else:
                target = teacher[some].gather(1, kept[some, few].unsqueeze(-1).expand(-1, -1, width))
            yield (some, few), student[some, few].to(dtype), target.to(dtype)


def _unit(rows: Tensor, inverse: Tensor) -> Tensor:
    return rows * inverse.unsqueeze(-1)


def forward(student: Tensor, teacher: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the loss and the inverse norms (B K, 2)."""
    samples, tokens, width = student.shape
    inverse = student.new_empty((samples, tokens, 2), dtype=statistics_dtype(student))
    total = student.new_zeros((), dtype=widest_dtype(student.device))
    for place, own, target in _rows(student, teacher, kept):
        both = [inverse_norms(x.reshape(-1, width), None, 0.0).view(x.shape[:2]) for x in (own, target)]
        inverse[place] = torch.stack(both, dim=-1)
        total += (_unit(own, both[0]) * _unit(target, both[1])).sum(-1).sum(dtype=total.dtype)
    return (-total / (samples * tokens)).to(inverse.dtype), inverse.view(samples * tokens, 2)


def backward(grad: Tensor, student: Tensor, teacher: Tensor, kept: Tensor | None, factors: Tensor) -> Tensor:
    """Return the gradient of the student, contiguous."""
    out = student.new_empty(student.shape)
    inverse = factors.view(*student.shape[:2], 2)
    scale = -grad.to(factors.dtype) / max(factors.shape[0], 1)
    for place, own, target in _rows(student, teacher, kept):
        by_student, by_teacher = inverse[place].unbind(-1)
        own, target = _unit(own, by_student), _unit(target, by_teacher)
        along = (own * target).sum(-1, keepdim=True)
        out[place] = ((scale * by_student).unsqueeze(-1) * (target - along * own)).to(out.dtype)
    return out
