"""Parameters and host operations of a recipe's step, counted from the modules themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from oner_fast.benchmarks.step.ours import OurStep
from oner_fast.benchmarks.step.setting import synthetic_batch
from oner_fast.models.oner import OneR
from oner_fast.train.oner.settings import OneRConfiguration
from oner_fast.train.oner.student import Student

_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "detach")


def parameters(config: OneRConfiguration) -> tuple[int, int]:
    """Count the trained parameters, and those of the moving-average teacher (0 without one). No memory is taken."""
    with torch.device("meta"):
        student = Student(replace(config.model), config.objectives)
        teacher = OneR(config.model) if config.objectives.momentum_teacher else None
    trained = _numbers(student, trained=True)
    return trained, 0 if teacher is None else _numbers(teacher, trained=False)


def operations(config: OneRConfiguration) -> int:
    """Count the leaf operations of a step: those of two and three layers at a tiny width, extended to the depth.

    The steps run on this CPU. A GPU's step differs in some casts.
    """
    two, three = (_operations_of(config, depth) for depth in (2, 3))
    return two + (config.model.depth - 2) * (three - two)


def _operations_of(config: OneRConfiguration, depth: int) -> int:
    model = replace(
        config.model, depth=depth, width=16, heads=2, image_size=2 * config.model.patch_size, vocab_size=64,
        embed_dim=16, projector_hidden=16 if config.model.projector_hidden else 0, grad_checkpointing=False,
    )  # fmt: skip
    objectives = replace(config.objectives, predictor_hidden=16)
    optim = replace(config.optim, batch_size=2, accum_freq=1)
    tiny = replace(config, model=model, objectives=objectives, optim=optim)
    step = OurStep(tiny, synthetic_batch(tiny, 3, 4), torch.bfloat16)
    step()  # makes the optimiser's state
    with _Operations() as counted:
        step()
    return counted.total


class _Operations(TorchDispatchMode):
    """Count operations that compute or move numbers; views and allocations start nothing on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2]
        view = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        made = [one for one in tree_flatten((args, results))[0] if isinstance(one, Tensor)]
        self.total += bool(made) and not view and name not in _ALLOCATIONS
        return results


def _numbers(module: nn.Module, *, trained: bool) -> int:
    return sum(one.numel() for one in module.parameters() if one.requires_grad or not trained)
