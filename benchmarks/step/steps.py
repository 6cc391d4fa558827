"""The form that all training steps of the benchmarks share, ours and the baselines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from oner_fast.benchmarks.step.setting import LEARNING_RATE
from oner_fast.train.config.common import Optimisation
from oner_fast.train.engine.optimizer import decays


class Step(ABC):
    """A training step on one batch: `step()` runs it whole.

    Attributes:
        name: the contender's name.
        optimizer: the optimiser of the trained module.
    """

    name: str
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def gradient(self) -> dict[str, Tensor]:
        """Run forward and backward: return the losses by name (0-d), leave the gradients in the parameters."""

    @abstractmethod
    def update(self) -> None:
        """Clip the gradients, take the optimiser's step and remove the gradients."""

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """Return the modules of the step, the trained one first."""

    @abstractmethod
    def inputs(self) -> list[Tensor]:
        """Return the tensors of the batch."""

    def __call__(self, call: int = 0) -> Tensor:
        """Run one training step; returns its loss."""
        loss = self.gradient()["loss"]
        self.update()
        return loss

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by the names of their parameters, which are the same for all steps of a contest."""
        named = self.modules()[0].named_parameters()
        return {name: parameter.grad for name, parameter in named if parameter.grad is not None}

    def given(self) -> list[Tensor]:
        """Return the tensors that exist before a step: weights, buffers and the batch."""
        tensors = [*self.inputs()]
        for module in self.modules():
            tensors += [*module.parameters(), *module.buffers()]
        return tensors


def plain_adamw(module: nn.Module, settings: Optimisation) -> torch.optim.AdamW:
    """Make PyTorch's fused AdamW with the trainer's settings."""
    named = list(module.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": settings.wd},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, LEARNING_RATE, betas, settings.eps, fused=True)


@contextmanager
def as_trained(deterministic: bool) -> Iterator[None]:
    """Choose deterministic algorithms, or not, as `oner_fast.train.engine.launch` does; restore the choice after."""
    before = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
