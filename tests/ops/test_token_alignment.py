from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oner_fast import _extension
from oner_fast.ops import reference, token_alignment
from oner_fast.ops.implementations import implementations

compiled = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")
REFUSED = (ValueError, RuntimeError)  # what a check in C++ raises: the first up to torch 2.13, the second in 2.15
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
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
def test_the_reference_agrees_with_a_plain_loop(
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
def test_the_loss_is_bounded_in_low_precision_too(implementation: str, dtype: torch.dtype) -> None:
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
def test_a_float64_teacher_is_read_in_the_students_precision(implementation: str) -> None:
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4, dtype=torch.float64)
    loss = token_alignment(student, teacher, implementation=implementation)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), plain(student.double(), teacher, None), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", EVERY)
def test_a_teacher_of_higher_precision_is_not_rounded_to_the_student(implementation: str) -> None:
    student, teacher = torch.randn(4, 8, 16).bfloat16(), torch.randn(4, 8, 16)
    loss = token_alignment(student, teacher, implementation=implementation)
    torch.testing.assert_close(loss.double(), plain(student.double(), teacher.double(), None), rtol=0, atol=1e-7)


def composed(student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """Plain PyTorch in the inputs' own dtype."""
    target = teacher.gather(1, kept.unsqueeze(-1).expand(-1, -1, student.shape[-1]))
    return -F.cosine_similarity(student, target, dim=-1, eps=1e-12).mean()


def worst(error: Tensor) -> float:
    return float(error.detach().abs().max())


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 129, 1024])
def test_error_is_near_that_of_plain_pytorch(dtype: torch.dtype, width: int) -> None:
    """At most twice (gradient three times) plain PyTorch's error against float64, and one unit in the last place."""
    student, teacher = torch.randn(3, 20, width).to(dtype).requires_grad_(), torch.randn(3, 31, width).to(dtype)
    kept = torch.randint(31, (3, 20))
    wide = student.detach().double().requires_grad_()
    exact, theirs = composed(wide, teacher.double(), kept), composed(student, teacher, kept)
    ours = token_alignment(student, teacher, kept, implementation="cpp")
    unit = torch.finfo(torch.float32).eps
    assert worst(ours.double() - exact) <= 2 * worst(theirs.double() - exact) + unit * worst(exact)
    truth, mine, other = (torch.autograd.grad(x, y)[0] for x, y in ((exact, wide), (ours, student), (theirs, student)))
    unit = torch.finfo(dtype).eps
    # Where float16 numbers are subnormal, a unit in the last place is the smallest of them.
    last = max(unit * worst(truth), torch.finfo(dtype).smallest_normal * unit)
    assert worst(mine.double() - truth) <= 3 * worst(other.double() - truth) + last


@compiled
@given(
    batch=st.integers(1, 3), visible=st.integers(1, 5), tokens=st.integers(1, 5), width=st.integers(1, 150),
    student_dtype=st.sampled_from([*DTYPES, torch.float64]), teacher_dtype=st.sampled_from([*DTYPES, torch.float64]),
    layout=st.sampled_from(["dense", "behind", "wider", "turned"]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_dtype_and_layout(
    batch: int, visible: int, tokens: int, width: int, student_dtype: torch.dtype, teacher_dtype: torch.dtype,
    layout: str, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)

    def placed(x: Tensor) -> Tensor:
        if layout == "behind":  # one element behind an aligned address
            return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
        if layout == "wider":
            return torch.empty(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)[..., 2:-1].copy_(x)
        return x.transpose(0, -1).contiguous().transpose(0, -1) if layout == "turned" else x

    student = placed(torch.randn(batch, visible, width).to(student_dtype)).requires_grad_()
    teacher = placed(torch.randn(batch, tokens, width).to(teacher_dtype))
    kept = torch.randint(tokens, (visible, batch)).t()
    ours, theirs = (token_alignment(student, teacher, kept, implementation=name) for name in ("cpp", "reference"))
    tolerance = 1e-13 if student_dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    mine, other = (torch.autograd.grad(loss, student)[0] for loss in (ours, theirs))
    assert mine.shape == student.shape and mine.dtype == student_dtype
    unit = torch.finfo(student_dtype).eps
    size = max(1e-3, worst(other.double()), float((1 / student.detach().double().norm(dim=-1)).max()))
    torch.testing.assert_close(mine, other, rtol=4 * unit, atol=8 * unit * size)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_zeros_infinities_and_nan_agree_with_the_reference(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(4, 3, 70, dtype=dtype), torch.randn(4, 3, 70, dtype=dtype)
    student[0, 0], teacher[0, 1] = 0, 0
    student[0, 2] *= 1e-14  # counts as a row of zeros
    teacher[1, 0] *= 1e-14
    student[1, 1] *= 1e-9
    student.requires_grad_()

    def outcome(name: str, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        loss = token_alignment(one, other, implementation=name)
        return loss.detach(), torch.autograd.grad(loss, one)[0]

    (loss, mine), (expected, theirs) = (outcome(name, student, teacher) for name in ("cpp", "reference"))
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected, rtol=8 * unit, atol=8 * unit)
    assert mine.isfinite().all()
    for ours, other in zip(mine.flatten(0, 1), theirs.flatten(0, 1), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=16 * unit * worst(other))
    for wrong in (float("nan"), float("inf"), -float("inf")):
        broken = student.detach().clone()
        broken[2, 1, 69] = wrong
        broken.requires_grad_()
        (loss, mine), (expected, theirs) = (outcome(name, broken, teacher) for name in ("cpp", "reference"))
        assert loss.isnan() and expected.isnan()
        assert torch.equal(mine.isnan().any(dim=-1), theirs.isnan().any(dim=-1))
        target = teacher.clone()
        target[3, 2, 0] = wrong
        (loss, mine), (expected, theirs) = (outcome(name, student, target) for name in ("cpp", "reference"))
        assert loss.isnan() and expected.isnan()
        assert torch.equal(mine.isnan().any(dim=-1), theirs.isnan().any(dim=-1))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("of_student", "of_teacher"), [(1e17, 1.0), (1e17, 1e17), (1e17, 1e-8), (1e-8, 1e17)])
def test_rows_whose_factors_underflow_float32(dtype: torch.dtype, of_student: float, of_teacher: float) -> None:
    """Rows whose squares barely fit have the cosine and the gradient that float64 gives them."""
    student, teacher = (torch.randn(2, 3, 70, dtype=torch.float64) for _ in range(2))
    student[0, 1] *= of_student
    teacher[0, 1] *= of_teacher
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    wide = student.detach().double().requires_grad_()
    ours, exact = token_alignment(student, teacher, implementation="cpp"), plain(wide, teacher.double(), None)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    mine, theirs = torch.autograd.grad(ours, student)[0], torch.autograd.grad(exact, wide)[0]
    assert theirs[0, 1].abs().max() > 0
    unit = torch.finfo(dtype).eps
    for one, other in zip(mine.flatten(0, 1), theirs.flatten(0, 1), strict=True):
        last = 2 * unit * max(worst(other), torch.finfo(dtype).smallest_normal)
        torch.testing.assert_close(one.double(), other, rtol=0, atol=last)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_any_threads_under_deterministic_algorithms(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True)
    student, teacher = torch.randn(5, 67, 700).to(dtype).requires_grad_(), torch.randn(5, 90, 700).to(dtype)
    kept = torch.randint(90, (5, 67))
    seen = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        loss = token_alignment(student, teacher, kept, implementation="cpp")
        seen.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    for other in seen[1:]:
        assert torch.equal(seen[0][0], other[0]) and torch.equal(seen[0][1], other[1])


@compiled
def test_a_large_gradient_bypasses_the_cache_with_the_same_bits() -> None:
    """More than 4 MiB, at an address that no vector divides; the same row by itself is written the other way."""
    student, teacher = torch.randn(8, 128, 1029).requires_grad_(), torch.randn(8, 128, 1029)
    loss = token_alignment(student, teacher, implementation="cpp")
    (everything,) = torch.autograd.grad(loss, student)
    for b in range(8):
        part = student[b : b + 1].detach().requires_grad_()
        alone = token_alignment(part, teacher[b : b + 1], implementation="cpp")
        (gradient,) = torch.autograd.grad(alone, part, torch.tensor(1 / 8))
        assert torch.equal(everything[b : b + 1], gradient)


@compiled
def test_saves_the_inputs_and_two_numbers_a_token() -> None:
    student, teacher = torch.randn(3, 5, 16).requires_grad_(), torch.randn(3, 9, 16)
    kept = torch.randint(9, (3, 5))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        token_alignment(student, teacher, kept, implementation="cpp")
    inputs = sum(x.numel() * x.element_size() for x in (student, teacher, kept))
    assert sum(x.numel() * x.element_size() for x in saved) == inputs + 2 * 4 * 3 * 5
    addresses = {x.data_ptr() for x in saved}
    assert {student.data_ptr(), teacher.data_ptr(), kept.data_ptr()} <= addresses


@compiled
def test_every_number_of_the_outputs_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for shape in ((1, 1, 1), (2, 3, 67), (9, 128, 1029)):
        student, teacher = torch.randn(shape), torch.randn(shape)
        loss, factors = torch.ops.oner_fast.token_alignment(student, teacher, None)
        gradient = torch.ops.oner_fast.token_alignment_backward(torch.ones(()), student, teacher, None, factors)
        assert loss.isfinite() and factors.isfinite().all() and gradient.isfinite().all()


@compiled
def test_opcheck() -> None:
    student, teacher, kept = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.tensor([[4, 4, 0], [1, 2, 3]])
    op, back = torch.ops.oner_fast.token_alignment.default, torch.ops.oner_fast.token_alignment_backward.default
    torch.library.opcheck(op, (student, teacher, kept))
    torch.library.opcheck(op, (student.bfloat16(), teacher[:, :3].double(), None))
    torch.library.opcheck(back, (torch.ones(()), student, teacher, kept, op(student, teacher, kept)[1]))


@compiled
def test_the_raw_op_stays_in_its_tensors_and_refuses_a_gradient() -> None:
    op, back = torch.ops.oner_fast.token_alignment, torch.ops.oner_fast.token_alignment_backward
    with pytest.raises(IndexError, match=r"kept must hold values in \[0, 5\), found 5"):
        op(S, T, K + 5)
    with pytest.raises(REFUSED, match="which teacher .* does not fit"):
        op(S, T, None)
    with pytest.raises(REFUSED, match=r"factors must be \(6, 2\) of Float"):
        back(torch.ones(()), S, T, K, torch.zeros(5, 2))
    with pytest.raises(RuntimeError, match="not implemented"):
        op(S.clone().requires_grad_(), T, K)[0].backward()


@compiled
def test_compiles_as_one_graph() -> None:
    student, teacher, kept = torch.randn(2, 3, 8).requires_grad_(), torch.randn(2, 5, 8), torch.randint(5, (2, 3))

    def run(student: Tensor) -> Tensor:
        return token_alignment(student, teacher, kept, implementation="cpp") * 2

    torch._dynamo.reset()
    ours, theirs = torch.compile(run, fullgraph=True, backend="aot_eager")(student), run(student)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student), rtol=0, atol=0)


def test_the_reference_is_public_with_the_same_arguments() -> None:
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
def test_errors_name_the_bad_argument(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        token_alignment(**{"student": S, "teacher": T, "kept": K, **arguments})
