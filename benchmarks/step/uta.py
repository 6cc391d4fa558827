"""One step of UTA: through the library's own classes, and in plain PyTorch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.benchmarks.step.baseline_model import wide
from oner_fast.benchmarks.step.plain_uta import PlainUTA
from oner_fast.benchmarks.step.setting import LEARNING_RATE
from oner_fast.benchmarks.step.steps import Step, as_trained, plain_adamw
from oner_fast.data.batch import PairBatch, no_text
from oner_fast.models.uta import UTA
from oner_fast.ops.patch_masks import draw_masks
from oner_fast.train.engine.distributed import World
from oner_fast.train.engine.optimizer import build_adamw, clip_grad_norm
from oner_fast.train.uta import recipes
from oner_fast.train.uta.inputs import with_cls
from oner_fast.train.uta.settings import UTAConfiguration
from oner_fast.train.uta.step import AlignmentStep
from oner_fast.train.uta.teacher_features import TeacherFeatures


def tiny_uta(batch_size: int) -> UTAConfiguration:
    """Make the configuration of the tiny recipe with another batch size."""
    base = recipes.uta_tiny_icons_cpu()
    return replace(base, optim=replace(base.optim, batch_size=batch_size))


class GivenFeatures:
    """Tokens of a teacher that were computed before: a step then costs what the student costs."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def take(self, batch: PairBatch) -> tuple[PairBatch, Tensor]:
        """Return the batch and its tokens (B, 1 + N, E)."""
        return batch, self.tokens


class OurUTAStep(Step):
    """Weights of seed 0, and one batch of random images with random target tokens for every step.

    Args:
        config: the configuration, which gives the batch its size.
        dtype: dtype of autocast; None computes in float32.
    """

    name = "ours"

    def __init__(self, config: UTAConfiguration, dtype: torch.dtype | None) -> None:
        self.config, model, pairs = config, config.model, config.optim.batch_size
        torch.manual_seed(0)
        self.student = UTA(model).train()
        images = torch.randint(256, (pairs, 3, model.image_size, model.image_size), dtype=torch.uint8)
        self.target = torch.randn(pairs, 1 + model.cells, model.embed_dim)
        self.batch = PairBatch(images, no_text(pairs), torch.arange(pairs), [""] * pairs, step=0, epoch=0)
        o = config.optim
        self.optimizer = build_adamw(self.student, LEARNING_RATE, (o.beta1, o.beta2), o.eps, o.wd)
        features = cast(TeacherFeatures, GivenFeatures(self.target))
        self.step = AlignmentStep(config, self.student, features, World(0, 1, 0, torch.device("cpu")), dtype)

    def gradient(self) -> dict[str, Tensor]:
        """Run forward and backward: return the loss, leave the gradients in the parameters."""
        return {"loss": self.step(self.batch)}

    def update(self) -> None:
        """Clip, and take the optimiser's step."""
        clip_grad_norm(self.student.parameters(), self.config.optim.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, call: int = 0) -> Tensor:
        """Run one training step as the trainer does; returns its loss."""
        with as_trained(self.config.run.deterministic):
            return super().__call__(call)

    def modules(self) -> list[nn.Module]:
        """Return the student."""
        return [self.student]

    def inputs(self) -> list[Tensor]:
        """Return the images and the teacher's tokens."""
        return [self.batch.images, self.target]


class PlainUTAStep(Step):
    """The step of `ours` in plain PyTorch: same weights, masks, targets, loss and optimiser.

    The masks and the kept target tokens are made beforehand, so that the step has nothing to do but the student's work.

    Args:
        ours: the step whose weights are copied.
        dtype: dtype of autocast; None computes in float32.
        compiled: compile the blocks and the loss.
        exact: compute in float64, for the errors of the others.
    """

    def __init__(
        self, ours: OurUTAStep, dtype: torch.dtype | None, compiled: bool = False, exact: bool = False
    ) -> None:
        self.name = "plain, compiled" if compiled else "plain, eager"
        self.config, model, alignment = ours.config, ours.config.model, ours.config.alignment
        self.dtype = dtype
        drawn = draw_masks(
            ours.config.run.seed, 0, ours.batch.samples, (model.grid, model.grid), alignment.hidden(model.cells),
            alignment.mask,
        )  # fmt: skip
        self.kept, self.images = drawn.kept, ours.batch.images
        rows = with_cls(drawn.kept).unsqueeze(-1).expand(-1, -1, model.embed_dim)
        self.target = ours.target.gather(1, rows)
        self.student = PlainUTA(model, paired=not compiled)
        self.student.load_state_dict(ours.student.state_dict())
        if exact:
            self.student, self.target = self.student.double(), self.target.double()
        self.student.prepare(drawn.kept)
        self.optimizer = plain_adamw(self.student, ours.config.optim)
        self._loss = torch.compile(_alignment, dynamic=False) if compiled else _alignment
        if compiled:
            for block in self.student.trunk.blocks:
                block.compile(dynamic=False)

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype is None else torch.autocast("cpu", dtype=self.dtype)

    def gradient(self) -> dict[str, Tensor]:
        """Run forward and backward: return the loss, leave the gradients in the parameters."""
        with self._autocast():
            tokens = self.student(self.images, self.kept)
        loss = self._loss(tokens, self.target)
        loss.backward()
        return {"loss": loss.detach()}

    def update(self) -> None:
        """Clip, and take the optimiser's step."""
        nn.utils.clip_grad_norm_(self.student.parameters(), self.config.optim.grad_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def modules(self) -> list[nn.Module]:
        """Return the student."""
        return [self.student]

    def inputs(self) -> list[Tensor]:
        """Return the images, the kept patches and their targets."""
        return [self.images, self.kept, self.target]


def _alignment(tokens: Tensor, target: Tensor) -> Tensor:
    return -F.cosine_similarity(wide(tokens), target, dim=-1).mean()
