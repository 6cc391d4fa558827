"""The case of `distill_info_nce`, which the op benchmarks do not time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.benchmarks.cases import OURS, Call, Case, Contender, exact_by
from oner_fast.ops import distill_info_nce, reference

SCALE = 20.0


def ours(query: Tensor, key: Tensor, scale: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
    return distill_info_nce(query, key, scale, teacher_query, teacher_key, SCALE)


def definition(query: Tensor, key: Tensor, scale: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
    return reference.distill_info_nce(query, key, scale, teacher_query, teacher_key, SCALE)


def plain(query: Tensor, key: Tensor, scale: Tensor, teacher_query: Tensor, teacher_key: Tensor) -> Tensor:
    """Compute the cross-entropies of the student's logits against the teacher's, in both directions."""

    def logits(q: Tensor, k: Tensor, by: Tensor | float) -> Tensor:
        return by * (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).T).float()

    student, teacher = logits(query, key, scale), logits(teacher_query, teacher_key, SCALE)
    rows = F.cross_entropy(student, teacher.softmax(1))
    return (rows + F.cross_entropy(student.T, teacher.T.softmax(1))) / 2


def case(rows: int, width: int, dtype: torch.dtype) -> Case:
    """Make the case of `rows` pairs of width `width`; the teacher's rows take no gradient."""

    def make(seed: int, device: str) -> Call:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(rows, width, generator=generator).to(device, dtype) for _ in range(4)]
        leaves = (*(one.requires_grad_() for one in drawn[:2]), torch.tensor(10.0, device=device, requires_grad=True))
        return Call((*leaves, *drawn[2:]), leaves, (torch.ones((), device=device),))

    size = torch.empty(0, dtype=dtype).element_size()
    return Case(
        op="distill_info_nce",
        shape=f"N {rows}, D {width}",
        dtype=dtype,
        make=make,
        contenders=[Contender(OURS, ours), Contender("eager cross-entropies of soft labels", plain)],
        exact=exact_by(definition),
        flops=10.0 * rows * rows * width,
        bytes=float(8 * rows * width * size),
        limit="gemm",
    )
