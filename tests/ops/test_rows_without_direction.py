"""A row of zeros takes no gradient, and a diverged row makes the loss not finite: in every implementation and dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oner_fast.ops import mixup_info_nce, reference, token_alignment
from oner_fast.ops.implementations import implementations

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
DIVERGED = {torch.float32: 1e20, torch.float16: math.inf, torch.bfloat16: 1e20, torch.float64: 1e200}


def able(op: str) -> list[str]:
    return [name for name, one in implementations(op).items() if not one.reasons_against("cpu")]


def contrast(implementation: str, query: Tensor, key: Tensor, **options: Any) -> Tensor:
    return mixup_info_nce(query, key, 10.0, **options, implementation=implementation)


@pytest.mark.parametrize("implementation", able("mixup_info_nce"))
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(2, 70),
    width=st.sampled_from([1, 7, 32, 64, 300]),
    of_query=st.sets(st.integers(0, 69), max_size=4),
    of_key=st.sets(st.integers(0, 69), max_size=4),
    others=st.sampled_from(["", "q", "qk"]),
    partner=st.booleans(),
    symmetric=st.booleans(),
    size=st.sampled_from([0.0, -0.0, 1e-13]),
)
def test_rows_of_zeros_stay_zero_and_take_no_gradient(
    implementation: str, dtype: torch.dtype, rows: int, width: int, of_query: set[int], of_key: set[int], others: str,
    partner: bool, symmetric: bool, size: float,
) -> None:  # fmt: skip
    """Loss and all gradients are those of the definition in float64."""
    generator = torch.Generator().manual_seed(rows)

    def numbers(zeros: set[int]) -> Tensor:
        x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        x = x + x.sign() * 0.1  # no other row is short
        for row in zeros:
            x[row % rows] = size / width
        return x.to(dtype).requires_grad_()

    leaves = {"query": numbers(of_query), "key": numbers(of_key)}
    if "q" in others:
        leaves["query_other"] = numbers(of_query)
    if "k" in others:
        leaves["key_other"] = numbers(of_key)
    options: dict[str, Any] = {"symmetric": symmetric}
    if partner:
        options["partner"] = torch.randint(rows, (rows,), generator=generator)
    if others:
        mix = torch.rand(rows, generator=generator)
        leaves["mix"] = (mix if dtype != torch.float64 else mix.double()).requires_grad_()
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    ours, exact = contrast(implementation, **leaves, **options), contrast("reference", **wide, **options)
    unit = max(torch.finfo(dtype).eps, 1e-15)
    torch.testing.assert_close(ours.double(), exact, rtol=40 * unit, atol=40 * unit)
    mine = torch.autograd.grad(ours, list(leaves.values()))
    right = torch.autograd.grad(exact, list(wide.values()))
    for name, one, other in zip(leaves, mine, right, strict=True):
        assert ((one.double() - other).abs() <= 60 * unit * (1 + other.abs().max())).all(), name
        if name != "mix":
            for row in of_query if name.startswith("query") else of_key:
                assert one[row % rows].count_nonzero() == 0 == other[row % rows].count_nonzero()


@pytest.mark.parametrize("implementation", able("mixup_info_nce"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("diverged", ["query", "key", "query_other", "key_other"])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_contrast_with_a_diverged_row_is_not_finite(
    implementation: str, dtype: torch.dtype, symmetric: bool, diverged: str, rows: int
) -> None:
    names = ["query", "key", *([diverged] if "other" in diverged else [])]
    leaves = {name: torch.randn(rows, 32).to(dtype).requires_grad_() for name in names}
    with torch.no_grad():
        leaves[diverged][rows // 2, 5] = DIVERGED[dtype]
    loss = contrast(implementation, **leaves, symmetric=symmetric)
    assert not loss.isfinite()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert not all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("implementation", able("mixup_info_nce"))
def test_a_long_row_that_fits_is_normalised(implementation: str) -> None:
    query, key = torch.randn(5, 16), torch.randn(5, 16)
    large = query.clone()
    large[2] *= 1e18
    ours = contrast(implementation, large, key)
    torch.testing.assert_close(ours, contrast(implementation, query, key), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", able("token_alignment"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 70])
def test_tokens_of_zeros_take_no_gradient(implementation: str, dtype: torch.dtype, width: int) -> None:
    student, teacher = torch.randn(2, 4, width).to(dtype), torch.randn(2, 4, width).to(dtype)
    student[0, 0], teacher[0, 1], student[1, 2], teacher[1, 2] = 0, 0, 0, 0
    student[1, 3] = 1e-14 / width
    if dtype == torch.float16:
        assert student[1, 3].count_nonzero() == 0
    wide = student.double().requires_grad_()
    exact = reference.token_alignment(wide, teacher.double())
    student.requires_grad_()
    loss = token_alignment(student, teacher, implementation=implementation)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    gradient, right = torch.autograd.grad(loss, student)[0], torch.autograd.grad(exact, wide)[0]
    # The derivative of a cosine is a difference: its terms are of the size 1 / (tokens * norm), and cancel at width 1.
    unit, terms = torch.finfo(dtype).eps, 1 / (8 * wide.detach().norm(dim=-1).clamp_min(1e-2).unsqueeze(-1))
    assert ((gradient.double() - right).abs() <= 4 * unit * (right.abs() + terms)).all()
    for row in ((0, 0), (0, 1), (1, 2), (1, 3)):
        assert gradient[row].count_nonzero() == 0 == right[row].count_nonzero()


@pytest.mark.parametrize("implementation", able("token_alignment"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_teacher", [False, True])
@pytest.mark.parametrize("columns", [1, 40])
def test_an_alignment_with_a_diverged_row_is_not_finite(
    implementation: str, dtype: torch.dtype, of_teacher: bool, columns: int
) -> None:
    """Also where no single square overflows, but their sum does."""
    student, teacher = torch.ones(2, 3, 40).to(dtype), torch.ones(2, 3, 40).to(dtype)
    value = {1: DIVERGED[dtype], 40: 4e18 if dtype in (torch.float32, torch.bfloat16) else DIVERGED[dtype]}[columns]
    (teacher if of_teacher else student)[1, 1, :columns] = value
    student.requires_grad_()
    loss = token_alignment(student, teacher, implementation=implementation)
    assert not loss.isfinite()
    gradient = torch.autograd.grad(loss, student)[0]
    assert not gradient[1, 1].isfinite().any() and gradient[0].isfinite().all()


def test_the_definition_has_second_derivatives_at_a_row_of_zeros() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    x[1] = 0
    x.requires_grad_()
    first = torch.autograd.grad(reference.unit(x).pow(3).sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), x)[0]
    assert second.isfinite().all() and second[1].count_nonzero() == 0 and second[0].count_nonzero() > 0
