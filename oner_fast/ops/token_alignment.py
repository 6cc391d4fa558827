"""token_alignment: minus the mean cosine of student and teacher tokens, the loss of UTA."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.ops import checks, reference
from oner_fast.ops.implementations import Facts, register
from oner_fast.ops.library import define, raw_ops, why_not_cuda, why_not_triton
from oner_fast.ops.serve import serve
from oner_fast.ops.transforms import Values, differentiable


@define(
    "token_alignment(Tensor student, Tensor teacher, Tensor? kept) -> (Tensor, Tensor)",
    triton="token_alignment.forward",
    portable=True,
)
def _forward_shape(student: Tensor, teacher: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = student.shape[0] * student.shape[1]
    dtype = statistics_dtype(student)
    return student.new_empty((), dtype=dtype), student.new_empty((rows, 2), dtype=dtype)


@define(
    "token_alignment_backward(Tensor grad, Tensor student, Tensor teacher, Tensor? kept, Tensor factors) -> Tensor",
    triton="token_alignment.backward",
    portable=True,
)
def _backward_shape(grad: Tensor, student: Tensor, teacher: Tensor, kept: Tensor | None, factors: Tensor) -> Tensor:
    return student.new_empty(student.shape)


class _TokenAlignment:
    """The loss and the gradient of the student; the inputs and two numbers for each student token are saved."""

    @staticmethod
    def compute(student: Tensor, teacher: Tensor, kept: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        loss, factors = raw_ops(backend).token_alignment(student, teacher, kept)
        return loss, factors

    @staticmethod
    def remember(ctx: Any, arguments: Values, results: Values) -> None:
        student, teacher, kept, ctx.backend = arguments
        ctx.save_for_backward(student, teacher, kept, results[1])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return raw_ops(ctx.backend).token_alignment_backward(grad, *ctx.saved_tensors), None, None, None


_token_alignment = differentiable("token_alignment", _TokenAlignment)


def _compiled(backend: str, student: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
    checks.token_alignment(student, teacher, kept)
    loss: Tensor = _token_alignment(student, teacher.detach(), kept, backend)
    return loss


_shapes = partial(_compiled, "cpp")
register("token_alignment", "reference", reference.token_alignment, preference=-10)
register("token_alignment", "portable", partial(_compiled, "portable"))
register("token_alignment", "cpp", partial(_compiled, "cpp"), devices=("cpu",), preference=100, compiled=True)
# Preferred over Triton, whose kernels move the same bytes: no launcher in Python, nothing to compile at the first call.
register(
    "token_alignment", "cuda", partial(_compiled, "cuda"), devices=("cuda",), preference=60, compiled=True,
    reasons=why_not_cuda("token_alignment"),
)  # fmt: skip
register(
    "token_alignment", "triton", partial(_compiled, "triton"), devices=("cuda",), on_request=("cpu",), preference=50,
    reasons=why_not_triton,
)  # fmt: skip


def facts(student: Tensor, *rest: Any, **options: Any) -> Facts:
    """Return the facts of a call with these arguments, by which its implementation is chosen; nothing is computed."""
    return "token_alignment", student.device.type, {"dtype": student.dtype}


def token_alignment(
    student: Tensor, teacher: Tensor, kept: Tensor | None = None, *, implementation: str | None = None
) -> Tensor:
    """Compute minus the mean cosine of the student's tokens with the teacher's at the same positions.

    Args:
        student: (B, K, D) float32, float16, bfloat16 or float64, not empty.
        teacher: (B, N, D) with `kept`, else (B, K, D), of any of these dtypes. It takes no gradient.
        kept: (B, K) int64 with values in [0, N): the teacher token that each student token is aligned with.
        implementation: force one by name; see `oner_fast.ops.implementations`.

    Returns:
        The loss, 0-d, in [-1, 1]: float32, or float64 for a float64 student.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit.
        IndexError: a value of `kept` is outside [0, N). On CUDA, values are checked only with `ONER_FAST_DEBUG=1`.
        RuntimeError: the forced implementation cannot run this call.
    """
    checks.is_tensor("token_alignment", "student", student)
    loss: Tensor = serve(facts(student), implementation, student, _shapes)(student, teacher, kept)
    return loss
