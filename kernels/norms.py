"""The norm that a row is divided by, with the rule for rows that have no direction."""

from __future__ import annotations

import triton
import triton.language as tl

LEAST_NORM = tl.constexpr(1e-12)  # a shorter row counts as a row of zeros


@triton.jit
def divisor_of(norm):
    """Return the divisor that makes rows of these norms unit vectors.

    The quotient is 0 for a row that counts as zeros, and NaN for a row whose squares overflow: a loss of diverged rows
    must not look finite.
    """
    infinity = tl.full((), float("inf"), norm.dtype)
    finite = tl.where(norm == infinity, float("nan"), norm)
    return tl.where(norm < tl.full((), LEAST_NORM, norm.dtype), infinity, finite)
