from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oner_fast.ops import reference, token_alignment
from oner_fast.ops.implementations import implementations

EVERY = [name for name, one in implementations("token_alignment").items() if not one.reasons_against("cpu")]


def plain(student: Tensor, teacher: Tensor, kept: Tensor | None) -> Tensor:
    """Token by token."""
    cosines = []
    for b in range(student.shape[0]):
        for k in range(student.shape[1]):
            mine, other = student[b, k], teacher[b, k if kept is None else int(kept[b, k])]
            cosines.append(mine @ other / (mine.norm() * other.norm()))
    return -torch.stack(cosines).mean()


@pytest.mark.parametrize("implementation", EVERY)
@given(
    batch=st.integers(1, 4),
    visible=st.integers(1, 6),
    tokens=st.integers(1, 6),
    width=st.integers(1, 9),
    chosen=st.booleans(),
)
def test_is_the_plain_loop(
    implementation: str, batch: int, visible: int, tokens: int, width: int, chosen: bool
) -> None:
    student = torch.randn(batch, visible, width, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(batch, tokens if chosen else visible, width, dtype=torch.float64)
    kept = torch.randint(tokens, (batch, visible)) if chosen else None
    ours = token_alignment(student, teacher, kept, implementation=implementation)
    exact = plain(student, teacher, kept)
    assert ours.shape == () and ours.dtype == torch.float64
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)
    mine, theirs = (torch.autograd.grad(loss, student)[0] for loss in (ours, exact))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", EVERY)
def test_gradcheck(implementation: str) -> None:
    student = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    teacher, kept = torch.randn(2, 5, 4, dtype=torch.float64), torch.tensor([[4, 4, 0], [1, 2, 3]])
    assert torch.autograd.gradcheck(lambda x: token_alignment(x, teacher, kept, implementation=implementation), student)


@pytest.mark.parametrize("implementation", EVERY)
def test_the_teacher_takes_no_gradient(implementation: str) -> None:
    student, teacher = (torch.randn(2, 3, 4).requires_grad_() for _ in range(2))
    token_alignment(student, teacher, implementation=implementation).backward()
    assert student.grad is not None and student.grad.abs().max() > 0 and teacher.grad is None
    assert not token_alignment(student.detach(), teacher, implementation=implementation).requires_grad


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bounds_and_low_precision(implementation: str, dtype: torch.dtype) -> None:
    student = torch.randn(2, 7, 33).to(dtype).requires_grad_()
    same = token_alignment(student, 3 * student, implementation=implementation)
    assert same.dtype == torch.float32 and abs(same.item() + 1) < (1e-6 if dtype == torch.float32 else 1e-3)
    torch.testing.assert_close(token_alignment(student, -student, implementation=implementation), torch.tensor(1.0))
    teacher = torch.randn(2, 9, 33).to(dtype)
    kept = torch.randint(9, (2, 7))
    wide = student.detach().double().requires_grad_()
    exact = plain(wide, teacher.double(), kept)
    ours = token_alignment(student, teacher, kept, implementation=implementation)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    mine, theirs = torch.autograd.grad(ours, student)[0], torch.autograd.grad(exact, wide)[0]
    assert mine.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(mine.double(), theirs, rtol=max(unit, 1e-5), atol=unit * float(theirs.abs().max()))


@pytest.mark.parametrize("implementation", EVERY)
def test_zero_tokens_autocast_and_strides(implementation: str) -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    student[0, 1], teacher[1, 2] = 0, 0
    student.requires_grad_()
    loss = token_alignment(student, teacher, implementation=implementation)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_alignment(student, teacher, implementation=implementation), loss)
    turned = teacher.transpose(0, 2).contiguous().transpose(0, 2)
    assert not turned.is_contiguous()
    torch.testing.assert_close(token_alignment(student, turned, implementation=implementation), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", EVERY)
def test_a_double_teacher_is_read_in_the_students_precision(implementation: str) -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4, dtype=torch.float64)
    loss = token_alignment(student, teacher, implementation=implementation)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), plain(student.double(), teacher, None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", EVERY)
def test_a_teacher_of_higher_precision_is_not_rounded_to_the_students(implementation: str) -> None:
    student, teacher = torch.randn(4, 8, 16).bfloat16(), torch.randn(4, 8, 16)
    loss = token_alignment(student, teacher, implementation=implementation)
    torch.testing.assert_close(loss.double(), plain(student.double(), teacher.double(), None), rtol=0, atol=1e-7)


def test_the_definition_is_public_with_the_same_arguments() -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    served = token_alignment(student, teacher, None, implementation="reference")
    assert torch.equal(served, reference.token_alignment(student, teacher, kept=None, implementation=None))


S, T, K = torch.zeros(2, 3, 8), torch.zeros(2, 5, 8), torch.zeros(2, 3, dtype=torch.int64)
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "student must be a torch.Tensor, got list", {"student": [[0.0]]}),
    (TypeError, "student must be float32.*got torch.int64", {"student": S.long()}),
    (ValueError, r"student must have shape \(B, K, D\).*got \(3, 8\)", {"student": S[0]}),
    (ValueError, r"student must hold at least one token, got shape \(2, 0, 8\)", {"student": S[:, :0]}),
    (TypeError, "teacher must be float32.*got torch.int64", {"teacher": T.long()}),
    (ValueError, r"teacher must have shape \(B, N, D\) = \(2, \*, 8\), got \(2, 5, 7\)", {"teacher": T[..., :7]}),
    (ValueError, r"teacher must have shape \(B, K, D\) = \(2, 3, 8\), got \(2, 5, 8\)", {"kept": None}),
    (TypeError, "kept must be int64, got torch.int32", {"kept": K.int()}),
    (ValueError, r"kept must have shape \(B, K\) = \(2, 3\), got \(2, 2\)", {"kept": K[:, :2]}),
    (IndexError, r"kept must hold values in \[0, 5\), found 5", {"kept": K + 5}),
    (IndexError, r"kept must hold values in \[0, 5\), found -1", {"kept": K - 1}),
    (ValueError, "teacher is on meta but student is on cpu", {"teacher": T.to("meta")}),
    (ValueError, "no implementation 'fast'", {"implementation": "fast"}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), WRONG)
def test_bad_arguments_are_named(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        token_alignment(**{"student": S, "teacher": T, "kept": K, **arguments})
