"""Unmasked token alignment (UTA, section 3.1): minus the mean cosine of student and teacher tokens."""

from __future__ import annotations

from torch import Tensor

from oner_fast.ops import checks, reference
from oner_fast.ops.implementations import choose, register

register("token_alignment", "reference", reference.token_alignment)


def token_alignment(
    student: Tensor, teacher: Tensor, kept: Tensor | None = None, *, implementation: str | None = None
) -> Tensor:
    """Minus the mean cosine of each student token with the teacher's at the same position.

    Args:
        student: (B, K, D) float32, float16, bfloat16 or float64.
        teacher: (B, N, D) with ``kept``, or (B, K, D); takes no gradient.
        kept: (B, K) int64 in [0, N): which teacher token each student token is aligned with.
        implementation: force one by name; see ``oner-fast doctor``.

    Returns:
        0-d float32 (float64 for a float64 student), in [-1, 1].

    Raises:
        ValueError, TypeError, IndexError: an argument's shape, dtype, device or value is not as above.
    """
    checks.is_tensor("token_alignment", "student", student)
    return choose("token_alignment", student.device.type, implementation, dtype=student.dtype).function(
        student, teacher, kept
    )
