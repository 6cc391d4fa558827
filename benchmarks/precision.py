"""Errors against float64: how they are counted, and more draws of the inputs than the check's single one.

A loss is one number, which is sometimes exact by chance, so that one draw says little about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from oner_fast.benchmarks.cases import Case, Forward, step
from oner_fast.benchmarks.rows import GRADIENTS, OUTPUTS, Row

DRAWS = 3


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the larger of two relative errors: maximum error over maximum value, and RMS error over RMS value."""
    if found.shape != exact.shape:
        raise ValueError(f"a result has the shape {tuple(found.shape)}, not {tuple(exact.shape)}")
    exact = exact.detach()
    error = found.detach().double() - exact
    scale = torch.finfo(torch.float64).tiny
    largest = error.abs().max() / exact.abs().max().clamp_min(scale)
    root = error.square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(scale)
    return float(torch.maximum(largest, root))


def grouped(errors: list[float], gradients: int) -> dict[str, float]:
    """Return the largest error of the outputs and of the `gradients` gradients, which come last."""
    outputs = len(errors) - gradients
    found = {OUTPUTS: max(errors[:outputs])}
    return found | ({GRADIENTS: max(errors[outputs:])} if gradients else {})


def more_draws(
    case: Case, forwards: Mapping[str, Forward], row: Row, device: str, progress: Callable[[str], None]
) -> None:
    """Compute the case for the seeds 1 to DRAWS - 1 too, and raise `row.precision` to the largest errors of all."""
    contenders = [one for one in case.contenders if one.name in row.precision and one.name not in row.refused]
    for seed in range(1, DRAWS):
        progress(f"float64, draw {seed + 1} of {DRAWS}")
        call = case.make(seed, device)
        exact = case.exact(call)
        for contender in contenders:
            progress(f"precision of {contender.name}, draw {seed + 1}")
            found = contender.restore(step(forwards[contender.name], contender.layout(call)))
            errors = [relative_error(one, true) for one, true in zip(found, exact, strict=True)]
            before = row.precision[contender.name]
            row.precision[contender.name] = {
                name: max(error, before[name]) for name, error in grouped(errors, len(call.leaves)).items()
            }
