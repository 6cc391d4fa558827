"""Check that two implementations of the step compute the same, before any timing."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from oner_fast.benchmarks.step.baseline import PlainStep, plain_name
from oner_fast.benchmarks.step.ours import OurStep


class Disagreement(RuntimeError):
    """Two implementations of the step do not compute the same."""


def check(ours: OurStep, plain: PlainStep, loss_tolerance: float, gradient_tolerance: float) -> None:
    """Compare the losses and each gradient of one forward and backward by their relative L2 distance.

    Gradients are removed afterwards.

    Raises:
        Disagreement: a loss or gradient differs by more than its tolerance; the message names all of them.
    """
    losses, theirs = ours.gradient(), plain.gradient()
    wrong = _compare(losses, theirs, loss_tolerance)
    mine = {plain_name(name): gradient for name, gradient in ours.gradients().items()}
    wrong += _compare(mine, plain.gradients(), gradient_tolerance)
    for each in (ours, plain):
        each.optimizer.zero_grad(set_to_none=True)
    if wrong:
        raise Disagreement(f"{plain.name} is not the same step: {'; '.join(wrong)}")


def _compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> list[str]:
    wrong = [f"only one has {name}" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in ours.keys() & theirs.keys():
        one, other = ours[name].double().flatten(), theirs[name].double().flatten()
        distance = float((one - other).norm() / other.norm().clamp(min=1e-30))
        if not distance <= tolerance:
            wrong.append(f"{name} differs by {distance:.2g}, allowed is {tolerance:.2g}")
    return wrong
