"""token_alignment: the student's visible tokens against the teacher's at the same positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.benchmarks.cases import OURS, Call, Case, Contender, Target, both, exact_by
from oner_fast.benchmarks.ops.masked_gather import random_kept
from oner_fast.ops import reference, token_alignment
from oner_fast.ops.token_alignment import facts


def _chosen(teacher: Tensor, kept: Tensor) -> Tensor:
    return teacher.gather(1, kept.unsqueeze(-1).expand(-1, -1, teacher.shape[-1]))


def cosine_similarity(student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    return -F.cosine_similarity(student.float(), _chosen(teacher, kept).float(), dim=-1).mean()


def normalised(student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    target = F.normalize(_chosen(teacher, kept).float(), dim=-1, eps=1e-12)
    return -(F.normalize(student.float(), dim=-1, eps=1e-12) * target).sum(-1).mean()


def of_rows(student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    """Select rows by number, and compute the cosine as one product over two norms."""
    mine, target = student.float(), teacher.index_select(0, rows).float()
    dots = torch.linalg.vecdot(mine, target)
    return -(dots / (torch.linalg.vector_norm(mine, dim=-1) * torch.linalg.vector_norm(target, dim=-1))).mean()


def flat(call: Call) -> Call:
    """Lay out tokens as rows, with the numbers of the teacher's rows computed beforehand."""
    student, teacher, kept = call.arguments
    batch, count, width = teacher.shape
    rows = (kept + count * torch.arange(batch, device=kept.device).unsqueeze(1)).flatten()
    leaf = student.detach().view(-1, width).requires_grad_()
    return Call((leaf, teacher.view(-1, width), rows), (leaf,), call.upstream)


def case(batch: int, tokens: int, width: int, kept: int, dtype: torch.dtype, target: Target) -> Case:
    def make(seed: int, device: str) -> Call:
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(batch, tokens, width, generator=generator).to(device, dtype)
        chosen = random_kept(batch, tokens, kept, generator).to(device)
        student = (_chosen(teacher.cpu(), chosen.cpu()) + torch.randn(batch, kept, width, generator=generator)).to(
            device, dtype
        )
        student.requires_grad_()
        return Call((student, teacher, chosen), (student,), (torch.ones((), device=device),))

    def restore(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return results[0], results[1].view(batch, kept, width)

    size = torch.empty(0, dtype=dtype).element_size()
    rows = batch * kept
    return Case(
        op="token_alignment",
        shape=f"({batch}, {kept} of {tokens}, {width})",
        dtype=dtype,
        make=make,
        contenders=[
            Contender(OURS, token_alignment),
            *both("cosine_similarity", cosine_similarity, quick=("eager",)),
            *both("normalise, sum", normalised, quick=("eager",)),
            *both("rows, vecdot", of_rows, layout=flat, restore=restore),
        ],
        exact=exact_by(reference.token_alignment),
        facts=facts,
        flops=10.0 * rows * width,
        # Both are read in forward and backward, and the student's gradient is written.
        bytes=float(5 * rows * width * size + 2 * rows * 8),
        limit="copy",
        target=target,
        # Two factors of each row.
        saved=2 * 4 * rows,
    )


def cases(quick: bool) -> list[Case]:
    target = Target(speedup=2.0)
    if quick:
        return [case(16, 196, 1024, 98, torch.float32, target)]
    return [case(64, 196, 1024, 98, dtype, target) for dtype in (torch.float32, torch.bfloat16)]
