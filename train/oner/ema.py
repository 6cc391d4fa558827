"""The momentum teacher: a moving average of the student's tower."""

from __future__ import annotations

import copy

import torch

from oner_fast.models.oner import OneR


def build_teacher(tower: OneR) -> OneR:
    """Copy `tower` without gradients."""
    return copy.deepcopy(tower).requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: OneR, tower: OneR, momentum: float) -> None:
    """Set every parameter to momentum * teacher + (1 - momentum) * student, in place."""
    torch._foreach_lerp_(list(teacher.parameters()), list(tower.parameters()), 1.0 - momentum)
