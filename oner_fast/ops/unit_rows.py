"""Rows mixed from two and made unit vectors by their inverse norms, and the way back for their gradients."""

from __future__ import annotations

from torch import Tensor

from oner_fast.ops.reference import LEAST_NORM, mixed


def inverse_norms(x: Tensor, other: Tensor | None, mix: Tensor | float) -> Tensor:
    """Return 1 / norm of the mixed rows (N, D): 0 for a row without direction, NaN for one whose squares overflow."""
    squares = mixed(x, other, mix).square().sum(1)
    inverse = squares.sqrt().reciprocal()
    return inverse.masked_fill(squares < LEAST_NORM**2, 0.0).masked_fill(squares.isinf(), float("nan"))


def unit_rows(x: Tensor, other: Tensor | None, mix: Tensor | float, inverse_norm: Tensor | None) -> Tensor:
    """Return the unit rows (N, D) in float32 or float64; the mixed rows as they are where they have no norm."""
    rows = mixed(x, other, mix)
    return rows if inverse_norm is None else rows * inverse_norm.unsqueeze(1)


def through_normalisation(
    gradient: Tensor, x: Tensor, other: Tensor | None, mix: Tensor, inverse_norm: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Backpropagate from `unit_rows` (N, D) to x, other and the mix of each row (N,)."""
    inner = gradient
    if inverse_norm is not None:
        rows, inverse = mixed(x, other, mix), inverse_norm.unsqueeze(1)
        along = inverse * inverse * (gradient * rows).sum(1, keepdim=True)
        inner = inverse * (gradient - along * rows)
    if other is None:
        return inner.to(x.dtype), None, None
    share = mix.unsqueeze(-1) if mix.ndim else mix
    to_mix = (inner * (other.to(inner.dtype) - x.to(inner.dtype))).sum(1)
    return ((1 - share) * inner).to(x.dtype), (share * inner).to(x.dtype), to_mix
