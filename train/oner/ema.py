"""The momentum teacher: a moving average of the student's tower."""

from __future__ import annotations

import copy

import torch

from oner_fast.models.oner import OneR


def build_teacher(tower: OneR) -> OneR:
    """A copy of `tower` that takes no gradient."""
    return copy.deepcopy(tower).requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: OneR, tower: OneR, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, over every parameter."""
    torch._foreach_lerp_(list(teacher.parameters()), list(tower.parameters()), 1.0 - momentum)
