"""The momentum teacher: a moving average of the student's tower."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from oner_fast.models.oner import OneR


def build_teacher(tower: OneR) -> OneR:
    """Copy `tower` without gradients."""
    return copy.deepcopy(tower).requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: OneR, tower: OneR, momentum: float, skip: Tensor | None = None) -> None:
    """Set every parameter to momentum * teacher + (1 - momentum) * student, in place.

    Args:
        teacher: the average.
        tower: the student's.
        momentum: in [0, 1].
        skip: 1.0 to leave the teacher as it is, else 0.0; 0-d, on the device of the parameters, where the host does not
            read it.
    """
    averages: list[Tensor] = [*teacher.parameters()]
    towers: list[Tensor] = [*tower.parameters()]
    weight = 1.0 - momentum
    if skip is not None and skip.device.type != "cpu":
        lerp_unless(skip, averages, towers, weight)
    elif skip is None or not skip.item():
        torch._foreach_lerp_(averages, towers, weight)


@torch.no_grad()
def lerp_unless(skip: Tensor, averages: list[Tensor], towers: list[Tensor], weight: float) -> None:
    """Move each average by `weight` towards its tower, in place, or by nothing where `skip` is 1.0.

    The host reads nothing: the weight is a number of the device, which PyTorch's `_foreach_lerp_` does not take.
    """
    differences = torch._foreach_sub(towers, averages)
    torch._foreach_mul_(differences, (1 - skip) * weight)
    torch._foreach_add_(averages, differences)
