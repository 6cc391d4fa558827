from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.kernels import token_alignment as kernels
from oner_fast.ops import reference
from oner_fast.ops import token_alignment as any_token_alignment

token_alignment = partial(any_token_alignment, implementation="triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(
    device: str, batch: int, visible: int, tokens: int, width: int, dtype: torch.dtype, teacher: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.randint(tokens, (batch, visible))
    target = torch.randn(batch, tokens, width)
    student = target.gather(1, kept.unsqueeze(-1).expand(-1, -1, width)) + torch.randn(batch, visible, width)
    return student.to(device, dtype).requires_grad_(), target.to(device, teacher), kept.to(device)


def exact(student: Tensor, teacher: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64."""
    wide = student.detach().double().requires_grad_()
    loss = reference.token_alignment(wide, teacher.double(), kept)
    return loss.detach(), torch.autograd.grad(loss, wide)[0]


def plain(student: Tensor, teacher: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain PyTorch in the inputs' own dtype."""
    target = teacher.to(student.dtype)
    if kept is not None:
        target = target.gather(1, kept.unsqueeze(-1).expand(-1, -1, student.shape[-1]))
    loss = -F.cosine_similarity(student, target, dim=-1, eps=1e-12).mean()
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def ours(student: Tensor, teacher: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    loss = token_alignment(student, teacher, kept)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def worst(error: Tensor) -> float:
    return float(error.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 129, 1408])
def test_error_is_near_that_of_plain_pytorch(device: str, dtype: torch.dtype, width: int) -> None:
    """At most twice (gradient three times) plain PyTorch's error against float64, and one unit in the last place."""
    given = inputs(device, 2, 3, 7, width, dtype, dtype)
    (loss, mine), (true_loss, truth), (other_loss, other) = ours(*given), exact(*given), plain(*given)
    assert loss.dtype == torch.float32 and loss.shape == () and mine.dtype == dtype and mine.shape == given[0].shape
    unit = torch.finfo(torch.float32).eps
    assert worst(loss - true_loss) <= 2 * worst(other_loss.double() - true_loss) + unit * worst(true_loss)
    unit = torch.finfo(dtype).eps
    # Where float16 numbers are subnormal, a unit in the last place is the smallest of them.
    last = max(unit * worst(truth), torch.finfo(dtype).smallest_normal * unit)
    assert worst(mine - truth) <= 3 * worst(other.double() - truth) + last


@pytest.mark.parametrize(
    ("student", "teacher", "layout"),
    [
        (torch.float64, torch.float64, "dense"), (torch.float64, torch.bfloat16, "turned"),
        (torch.float32, torch.float64, "wider"), (torch.bfloat16, torch.float32, "turned"),
        (torch.bfloat16, torch.float32, "dense"), (torch.float16, torch.bfloat16, "same"),
    ],
)  # fmt: skip
def test_any_dtypes_and_layout(device: str, student: torch.dtype, teacher: torch.dtype, layout: str) -> None:
    """The teacher is not rounded to the student's precision, and rows lie anywhere."""

    def placed(x: Tensor) -> Tensor:
        if layout == "wider":
            return torch.empty(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype, device=device)[..., 2:-1].copy_(x)
        if layout == "same":
            return x[:1].expand(x.shape)
        return x.transpose(0, -1).contiguous().transpose(0, -1) if layout == "turned" else x

    one, target, kept = inputs(device, 3, 4, 5, 70, student, teacher)
    one, target = placed(one.detach()).requires_grad_(), placed(target)
    chosen = None if layout == "wider" else kept.t().contiguous().t()
    if chosen is None:
        target = target[:, :4]
    (loss, mine), (true_loss, truth) = ours(one, target, chosen), exact(one, target, chosen)
    unit = torch.finfo(student).eps
    small = 1e-14 if student == torch.float64 else 3e-7
    torch.testing.assert_close(loss.double(), true_loss, rtol=small, atol=small)
    torch.testing.assert_close(mine.double(), truth, rtol=2 * unit, atol=16 * unit * worst(truth))


def test_gradcheck(device: str) -> None:
    student, teacher, kept = inputs(device, 1, 2, 3, 3, torch.float64, torch.float64)
    assert torch.autograd.gradcheck(lambda x: token_alignment(x, teacher, kept), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_zeros_infinities_and_nan_agree_with_the_reference(device: str, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(4, 3, 150, dtype=dtype), torch.randn(4, 3, 150, dtype=dtype)
    student[0, 0], teacher[0, 1] = 0, 0
    student[0, 2] *= 1e-14  # counts as a row of zeros
    teacher[1, 0] *= 1e-14
    student[1, 1] *= 1e-9
    student, teacher = student.to(device).requires_grad_(), teacher.to(device)

    def outcome(function: Any, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        loss = function(one, other)
        return loss.detach(), torch.autograd.grad(loss, one)[0]

    (loss, mine), (expected, theirs) = (
        outcome(f, student, teacher) for f in (token_alignment, reference.token_alignment)
    )
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected, rtol=8 * unit, atol=8 * unit)
    assert mine.isfinite().all()
    for one, other in zip(mine.flatten(0, 1), theirs.flatten(0, 1), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=16 * unit * worst(other))
    for wrong in (float("nan"), float("inf"), -float("inf")):
        for place in ("student", "teacher"):
            broken, target = student.detach().clone(), teacher.clone()
            (broken if place == "student" else target)[2, 1, 149] = wrong
            broken.requires_grad_()
            (loss, mine), (expected, theirs) = (
                outcome(f, broken, target) for f in (token_alignment, reference.token_alignment)
            )
            assert loss.isnan() and expected.isnan()
            assert torch.equal(mine.isnan().any(dim=-1), theirs.isnan().any(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("of_student", "of_teacher"), [(1e17, 1.0), (1e17, 1e17), (1e-8, 1e17)])
def test_rows_whose_factors_underflow_float32(
    device: str, dtype: torch.dtype, of_student: float, of_teacher: float
) -> None:
    """Rows whose squares barely fit have the cosine and the gradient that float64 gives them."""
    student, teacher = (torch.randn(2, 3, 140, dtype=torch.float64) for _ in range(2))
    student[0, 1] *= of_student
    teacher[0, 1] *= of_teacher
    student, teacher = student.to(device, dtype).requires_grad_(), teacher.to(device, dtype)
    (loss, mine), (true_loss, truth) = ours(student, teacher, None), exact(student, teacher, None)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-6)
    assert truth[0, 1].abs().max() > 0
    unit = torch.finfo(dtype).eps
    for one, other in zip(mine.flatten(0, 1), truth.flatten(0, 1), strict=True):
        last = 2 * unit * max(worst(other), torch.finfo(dtype).smallest_normal)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_has_no_gradient_and_a_diverged_one_no_finite_loss(device: str, dtype: torch.dtype) -> None:
    student, teacher = (torch.randn(1, 3, 40, dtype=dtype) for _ in range(2))
    student[0, 0], teacher[0, 1] = 0, 0

    def outcome() -> tuple[Tensor, Tensor]:
        return ours(student.clone().to(device).requires_grad_(), teacher.to(device), None)

    loss, gradient = outcome()
    assert loss.isfinite() and gradient[0, :2].count_nonzero() == 0 and gradient[0, 2].count_nonzero() > 0
    for place in (student, teacher):
        before = place[0, 2].clone()
        place[0, 2, 7] = float("inf") if dtype == torch.float16 else 1e20
        loss, gradient = outcome()
        assert not loss.isfinite() and not gradient[0, 2].isfinite().any()
        place[0, 2] = before


def test_the_gradient_of_orthogonal_rows_is_exact(device: str) -> None:
    """The factor of the student is exactly 0, as that of a row of zeros is, and must not be taken for one."""
    student = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]], device=device, requires_grad=True)
    teacher = torch.tensor([[[0.0, 2.0], [4.0, -3.0]]], device=device)
    loss, gradient = ours(student, teacher, None)
    assert loss == 0
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[[0.0, -0.5], [-0.08, 0.06]]]))


def test_programs_with_several_rows_give_the_same_bits_twice(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 6)
    monkeypatch.setattr(kernels, "MEAN", replace(kernels.MEAN, blocks={"BLOCK": 4}))
    given = inputs(device, 3, 7, 9, 33, torch.float32, torch.float32)  # 21 rows: 6 programs of up to 4
    torch.use_deterministic_algorithms(True)
    (loss, mine), (again, same), (true_loss, truth) = ours(*given), ours(*given), exact(*given)
    assert torch.equal(loss, again) and torch.equal(mine, same)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-7)


def test_every_number_of_the_outputs_is_written(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for shape in ((1, 1, 1), (2, 3, 67)):
        student, teacher = torch.randn(shape, device=device), torch.randn(shape, device=device)
        loss, factors = torch.ops.oner_fast_triton.token_alignment(student, teacher, None)
        one = torch.ones((), device=device)
        gradient = torch.ops.oner_fast_triton.token_alignment_backward(one, student, teacher, None, factors)
        assert loss.isfinite() and factors.isfinite().all() and gradient.isfinite().all()


def test_wrong_indices_stay_inside_the_teacher(device: str) -> None:
    """A wrong index, which CUDA does not check, reads the nearest token; the executor finds any other access."""
    student, teacher = torch.randn(2, 3, 8, device=device), torch.randn(2, 5, 8, device=device)
    wild = torch.tensor([[-1, 5, 2**40], [-(2**40), 1, 4]], device=device)
    op, back = torch.ops.oner_fast_triton.token_alignment, torch.ops.oner_fast_triton.token_alignment_backward
    (loss, factors), (expected, _) = op(student, teacher, wild), op(student, teacher, wild.clamp(0, 4))
    assert torch.equal(loss, expected)
    assert back(torch.ones((), device=device), student, teacher, wild, factors).isfinite().all()


def test_addresses_beyond_two_to_the_31(device: str) -> None:
    """Samples so far apart that a 32-bit product of their number and stride would wrap, in memory never touched."""
    apart = 2**30 + 16
    try:
        room = torch.empty(2 * apart + 64, dtype=torch.float16, device=device)
    except RuntimeError:
        pytest.skip("not even the addresses of 4 GiB are to be had")
    far = room.as_strided((3, 2, 16), (apart, 16, 1))
    near = torch.randn(3, 2, 16, dtype=torch.float16, device=device)
    far.copy_(near)
    teacher, kept = (
        torch.randn(3, 3, 16, dtype=torch.float16, device=device),
        torch.tensor([[2, 0], [1, 1], [0, 2]], device=device),
    )
    mine = ours(far.requires_grad_(), teacher, kept)
    true_loss, truth = exact(near, teacher, kept)
    torch.testing.assert_close(mine[0].double(), true_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine[1].double(), truth, rtol=1e-3, atol=1e-4)
    (loss, _), (true_loss, _) = ours(near.requires_grad_(), far.detach(), kept % 2), exact(near, near, kept % 2)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-6, atol=1e-6)


def test_opcheck_and_one_graph(device: str) -> None:
    student, teacher, kept = inputs(device, 2, 3, 5, 8, torch.float32, torch.float32)
    op, back = torch.ops.oner_fast_triton.token_alignment, torch.ops.oner_fast_triton.token_alignment_backward
    frozen = student.detach()
    torch.library.opcheck(op.default, (frozen, teacher, kept))
    one = torch.ones((), device=device)
    torch.library.opcheck(back.default, (one, frozen, teacher, kept, op(frozen, teacher, kept)[1]))

    def run(student: Tensor) -> Tensor:
        return token_alignment(student, teacher, kept) * 2

    torch._dynamo.reset()
    mine, theirs = torch.compile(run, fullgraph=True, backend="aot_eager")(student), run(student)
    assert torch.equal(mine, theirs)
    assert torch.equal(torch.autograd.grad(mine, student)[0], torch.autograd.grad(theirs, student)[0])


def test_counted_bytes_and_instructions(device: str, executor: Any) -> None:
    """On the emulated A100: DRAM bytes and sectors within a hundredth of the ideal, no shared memory."""
    if executor is None:
        pytest.skip("only the emulation counts")
    given = inputs(device, 4, 16, 32, 1024, torch.bfloat16, torch.bfloat16)
    given[2].copy_(torch.rand(4, 32).argsort(1)[:, :16])  # every row once
    executor.clear()
    ours(*given)
    rows, row = 4 * 16, 2 * 1024
    forward, mean, backward = (launch.stats for launch in executor)
    assert [launch.shared for launch in executor] == [0, 32, 0]  # the mean's four warps meet in 32 bytes
    assert 2 * rows * row <= forward.unique_read_bytes <= 1.01 * 2 * rows * row
    assert 2 * rows * row <= backward.unique_read_bytes <= 1.01 * 2 * rows * row
    assert backward.unique_write_bytes == rows * row
    assert forward.memory["global_ld"].sectors <= 1.1 * 2 * rows * row / 32
    assert mean.unique_write_bytes == 32
    assert forward.warp_instructions <= 450 * rows and backward.warp_instructions <= 330 * rows
