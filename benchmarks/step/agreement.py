"""Check that two implementations of the step compute the same, before any timing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from oner_fast.benchmarks.rows import GRADIENTS, OUTPUTS
from oner_fast.benchmarks.step.steps import Step


class Disagreement(RuntimeError):
    """Two implementations of the step do not compute the same."""


def check(ours: Step, plain: Step, loss_tolerance: float, gradient_tolerance: float) -> None:
    """Compare the losses and each gradient of one forward and backward by their relative L2 distance.

    Gradients are removed afterwards.

    Raises:
        Disagreement: a loss or gradient differs by more than its tolerance; the message names all of them.
    """
    losses, theirs = ours.gradient(), plain.gradient()
    wrong = _compare(losses, theirs, loss_tolerance)
    wrong += _compare(ours.gradients(), plain.gradients(), gradient_tolerance)
    for each in (ours, plain):
        each.optimizer.zero_grad(set_to_none=True)
    if wrong:
        raise Disagreement(f"{plain.name} is not the same step: {'; '.join(wrong)}")


def errors(exact: Step, steps: Mapping[str, Step]) -> dict[str, dict[str, float]]:
    """Compare one forward and backward of each of `steps` with that of `exact`, which computes in float64.

    Returns:
        By step: the largest relative error of its losses, and the relative L2 distance of all its gradients together.
        Gradients are removed afterwards.
    """
    true = _all(exact)
    found = {}
    for name, step in steps.items():
        losses, gradients = _all(step)
        worst = max(float((losses[one] - value).abs() / value.abs()) for one, value in true[0].items())
        distance = torch.stack([(gradients[one] - value).norm() for one, value in true[1].items()]).norm()
        scale = torch.stack([value.norm() for value in true[1].values()]).norm()
        found[name] = {OUTPUTS: worst, GRADIENTS: float(distance / scale)}
    return found


def _all(step: Step) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return losses and gradients, converted to float64, and remove the gradients."""
    losses = {name: value.double() for name, value in step.gradient().items()}
    gradients = {name: value.double().flatten() for name, value in step.gradients().items()}
    step.optimizer.zero_grad(set_to_none=True)
    return losses, gradients


def _compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> list[str]:
    wrong = [f"only one has {name}" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in ours.keys() & theirs.keys():
        one, other = ours[name].double().flatten(), theirs[name].double().flatten()
        distance = float((one - other).norm() / other.norm().clamp(min=1e-30))
        if not distance <= tolerance:
            wrong.append(f"{name} differs by {distance:.2g}, allowed is {tolerance:.2g}")
    return wrong
