"""The step through the library's own classes, as the trainer takes it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oner_fast.benchmarks.step.names import plain_name
from oner_fast.benchmarks.step.setting import LEARNING_RATE, MOMENTUM, Words
from oner_fast.benchmarks.step.steps import Step, as_trained
from oner_fast.data.batch import PairBatch
from oner_fast.models.oner import OneR
from oner_fast.train.engine.distributed import World
from oner_fast.train.engine.optimizer import build_adamw, clip_grad_norm
from oner_fast.train.oner.ema import build_teacher, update_teacher
from oner_fast.train.oner.settings import OneRConfiguration
from oner_fast.train.oner.step import TrainingStep
from oner_fast.train.oner.student import Student


class OurStep(Step):
    """Weights of seed 0, a teacher with other weights, and one batch for every step.

    Args:
        config: the configuration; its batch size is that of `batch`.
        batch: the batch of every step.
        dtype: dtype of autocast; None computes in float32.
        device: where it runs; the batch stays on the CPU, as a loader leaves it.
    """

    name = "ours"

    def __init__(
        self, config: OneRConfiguration, batch: PairBatch, dtype: torch.dtype | None, device: str = "cpu"
    ) -> None:
        self.config, self.batch = config, batch
        torch.manual_seed(0)
        self.student = Student(config.model, config.objectives).train().to(device)
        self.teacher = build_teacher(OneR(config.model).to(device))
        o = config.optim
        self.optimizer = build_adamw(self.student, LEARNING_RATE, (o.beta1, o.beta2), o.eps, o.wd)
        words, world = Words(config.model.vocab_size), World(0, 1, 0, torch.device(device))
        self.step = TrainingStep(config, self.student, self.teacher, words, world, dtype)

    def gradient(self) -> dict[str, Tensor]:
        """Run forward and backward: return the losses by name (0-d), leave the gradients in the parameters."""
        result = self.step(self.batch)
        return {"loss": result.loss, **result.parts}

    def update(self) -> None:
        """Clip, take the optimiser's step and move the teacher."""
        clip_grad_norm(self.student.parameters(), self.config.optim.grad_clip_norm)
        self.optimizer.step()
        self.student.clamp_temperature()
        update_teacher(self.teacher, self.student.tower, MOMENTUM)
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, call: int = 0) -> Tensor:
        """Run one training step under deterministic algorithms, the trainer's default; returns its loss."""
        with as_trained(self.config.run.deterministic):
            loss = self.gradient()["loss"]
            self.update()
        return loss

    def modules(self) -> list[nn.Module]:
        """Return the student and the teacher."""
        return [self.student, self.teacher]

    def inputs(self) -> list[Tensor]:
        """Return the images and the words."""
        return [self.batch.images, self.batch.text.input_ids, self.batch.text.cu_seqlens]

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by the plain model's names."""
        return {plain_name(name): gradient for name, gradient in super().gradients().items()}
