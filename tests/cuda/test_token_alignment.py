from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oner_fast.ops import reference

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
PAIRS = [(a, b) for a in (F32, F16, BF16) for b in (F32, F16, BF16)] + [(F64, F64)]
ODD_PAIRS = [(F64, F32), (BF16, F64)]


def wide(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def fields(lib: Any, student: Tensor, teacher: Tensor, kept: Tensor | None) -> dict[str, Any]:
    return dict(
        student=student, teacher=teacher, kept=kept, samples=student.shape[0], per_sample=student.shape[1],
        cells=teacher.shape[1], student_sample_stride=student.stride(0), student_token_stride=student.stride(1),
        teacher_sample_stride=teacher.stride(0), teacher_token_stride=teacher.stride(1), width=student.shape[2],
        student_number=lib.number(student), teacher_number=lib.number(teacher),
    )  # fmt: skip


def forward(lib: Any, student: Tensor, teacher: Tensor, kept: Any = None, **settings: Any) -> tuple[Tensor, Tensor]:
    rows = student.shape[0] * student.shape[1]
    factors, loss = lib.poison(rows, 2, dtype=wide(student.dtype)), lib.poison(1, dtype=wide(student.dtype))
    partials = lib.poison(lib.library.oner_fast_token_alignment_partials(rows), dtype=F64)
    given = dict(loss=loss, factors=factors, partials=partials)
    lib.call("token_alignment", {**fields(lib, student, teacher, kept), **given}, **settings)
    return loss, factors


def backward(
    lib: Any, grad: float, student: Tensor, teacher: Tensor, kept: Any, factors: Tensor, **settings: Any
) -> Tensor:
    out = lib.poison(*student.shape, dtype=student.dtype)
    given = dict(grad=torch.tensor([grad], dtype=wide(student.dtype)), factors=factors, to_student=out)
    lib.call("token_alignment_backward", {**fields(lib, student, teacher, kept), **given}, **settings)
    return out


def exact_of(student: Tensor, teacher: Tensor, kept: Any, grad: float) -> tuple[Tensor, Tensor]:
    leaf = student.double().requires_grad_()
    loss = reference.token_alignment(leaf, teacher.double(), kept)
    return loss.detach(), torch.autograd.grad(loss * grad, leaf)[0]


def check(lib: Any, student: Tensor, teacher: Tensor, kept: Any, grad: float = 3.0, **settings: Any) -> None:
    exact_loss, exact = exact_of(student, teacher, kept, grad)
    loss, factors = forward(lib, student, teacher, kept, **settings)
    few = 1e-6 if wide(student.dtype) == F32 else 1e-14
    torch.testing.assert_close(loss[0].double(), exact_loss, rtol=few, atol=few)
    ours = backward(lib, grad, student, teacher, kept, factors, **settings)
    # What the terms are that may cancel, and the last place of the smallest numbers.
    info, terms = torch.finfo(ours.dtype), grad / (student[..., 0].numel() * student.double().norm(dim=-1).min().item())
    torch.testing.assert_close(ours.double(), exact, rtol=info.eps, atol=few * terms + info.smallest_normal * info.eps)


@pytest.mark.parametrize("student,teacher", [*PAIRS, *ODD_PAIRS])
def test_agrees_with_the_reference(library: Any, student: torch.dtype, teacher: torch.dtype) -> None:
    lib, generator = library("token_alignment"), torch.Generator().manual_seed(0)
    mine, other = (torch.randn(2, 9, 72, generator=generator).to(dtype) for dtype in (student, teacher))
    check(lib, mine, other, None, shuffle=1)
    fast = (student, teacher) in PAIRS
    assert ("Li0E" not in lib.log[0].kernel) == fast
    kept = torch.randint(9, (2, 5), generator=generator)
    check(lib, mine[:, :5], other, kept, seed=1)


@pytest.mark.parametrize("student,teacher", [(F32, F32), (BF16, F32), (F64, F64), (F16, F16)])
def test_any_width_and_strides(library: Any, student: torch.dtype, teacher: torch.dtype) -> None:
    lib = library("token_alignment")
    for width in (1, 13):
        mine, other = torch.randn(1, 3, width).to(student), torch.randn(1, 3, width).to(teacher)
        check(lib, mine, other, None)
        assert "Li0E" in lib.log[0].kernel
    mine = torch.randn(2, 4, 300).to(student)[:, 1:, 8:280]
    check(lib, mine, torch.randn(1, 3, 272).to(teacher).expand(2, 3, 272), None)


@pytest.mark.parametrize("width", [8, 7])
def test_extreme_rows(library: Any, width: int) -> None:
    """Squares that barely fit float32, rows of zeros, orthogonal and tiny rows, as float64 has them."""
    lib, other = library("token_alignment"), torch.randn(1, 6, width)
    mine = torch.randn(1, 6, width)
    mine[0, 0] *= 1e17
    mine[0, 1] = 0
    mine[0, 2] *= 1e-14
    mine[0, 3] = torch.eye(width)[0]
    other[0, 3] = torch.eye(width)[1]
    other[0, 4] *= 1e17
    other[0, 5] = 0
    exact_loss, exact = exact_of(mine, other, None, 1.0)
    loss, factors = forward(lib, mine, other)
    torch.testing.assert_close(loss[0].double(), exact_loss, rtol=1e-6, atol=1e-6)
    ours = backward(lib, 1.0, mine, other, None, factors)
    for row in range(6):
        torch.testing.assert_close(
            ours[0, row].double(), exact[0, row], rtol=2e-5, atol=1e-6 * exact[0, row].abs().max().item()
        )


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [8, 7])
def test_a_diverged_row_has_no_finite_loss(library: Any, width: int, dtype: torch.dtype) -> None:
    """The narrow width is read number by number and summed in double, where no square of float overflows."""
    lib = library("token_alignment")
    for place in range(2):
        rows = [torch.ones(1, 2, width, dtype=dtype) for _ in range(2)]
        rows[place][0, 1, 3] = 1e20
        loss, factors = forward(lib, *rows)
        assert loss.isnan() and not factors[0].isnan().any() and factors[1].isnan().all()
        ours = backward(lib, 1.0, *rows, None, factors)
        assert ours[0, 1].isnan().all() and ours[0, 0].isfinite().all()


def test_nan_stays_and_indices_are_clamped(library: Any) -> None:
    lib, other = library("token_alignment"), torch.randn(1, 4, 8)
    mine = torch.randn(1, 4, 8)
    mine[0, 2, 3] = float("nan")
    loss, factors = forward(lib, mine, other)
    assert loss.isnan() and not factors[[0, 1, 3]].isnan().any()
    ours = backward(lib, 1.0, mine, other, None, factors)
    assert ours[0, 2].isnan().all() and not ours[0, [0, 1, 3]].isnan().any()
    kept = torch.tensor([[-1, 4, 2**62, 1]])
    for width in (8, 7):
        loss, factors = forward(lib, mine[:, :, :width].nan_to_num(), other[:, :, :width], kept)
        assert not loss.isnan()
        assert not backward(lib, 1.0, mine[:, :, :width].nan_to_num(), other[:, :, :width], kept, factors).isnan().any()


def test_offsets_beyond_32_bits(library: Any) -> None:
    room = torch.empty(2**31 + 64, dtype=F16)
    teacher = room.as_strided((2, 2, 8), (2**31, 8, 1))
    teacher.copy_(torch.randn(2, 2, 8))
    check(library("token_alignment"), torch.randn(2, 2, 8), teacher, None, stats=False, global_race=False)


def test_the_same_bits_in_any_order(library: Any) -> None:
    lib, mine, other = library("token_alignment"), torch.randn(3, 50, 24).to(BF16), torch.randn(3, 50, 24).to(BF16)
    loss, factors = forward(lib, mine, other)
    for seed in (1, 2):
        again = forward(lib, mine, other, seed=seed, shuffle=seed)
        assert torch.equal(again[0], loss) and torch.equal(again[1], factors)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bytes_are_the_ideal(library: Any, dtype: torch.dtype) -> None:
    lib, kept = library("token_alignment"), torch.stack([torch.randperm(16)[:8] for _ in range(4)])
    mine, other = torch.randn(4, 8, 256).to(dtype), torch.randn(4, 16, 256).to(dtype)
    _, factors = forward(lib, mine, other, kept)
    moved = sum(each.unique_read_bytes + each.unique_write_bytes for each in lib.log)
    rows = mine.numel() * mine.element_size()
    assert moved <= 1.02 * (2 * rows + 32 * 8 + kept.numel() * 8 + 256)
    for kind, access in lib.log[0].memory.items():
        if kind == "shared_ld" or kind == "shared_st":
            assert access.wavefronts == access.ideal_wavefronts
    backward(lib, 1.0, mine, other, kept, factors)
    stats = lib.log[0]
    assert stats.unique_read_bytes + stats.unique_write_bytes <= 1.02 * (3 * rows + 32 * 8 + kept.numel() * 8 + 64)
    stores = stats.memory["global_st"]
    assert stores.bytes == 32 * stores.sectors
