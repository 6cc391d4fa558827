"""One step of CLIP: through the library's own classes, and by open_clip."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.benchmarks.step.baseline_model import wide
from oner_fast.benchmarks.step.setting import LEARNING_RATE
from oner_fast.benchmarks.step.steps import Step, as_trained, plain_adamw
from oner_fast.data.batch import PairBatch, no_text
from oner_fast.models.clip import MAX_LOGIT_SCALE, clip_pixels, clip_tokenizer
from oner_fast.train.clip import recipes
from oner_fast.train.clip.settings import CLIPConfiguration
from oner_fast.train.clip.step import ContrastStep
from oner_fast.train.clip.towers import NewTowers
from oner_fast.train.engine.distributed import World
from oner_fast.train.engine.optimizer import build_adamw, clip_grad_norm

_TEXT = "a small red house stands near the old river while two dogs run past it"


def tiny_clip(batch_size: int) -> CLIPConfiguration:
    """Make the configuration of the tiny recipe with another batch size."""
    base = recipes.clip_tiny_icons_cpu()
    return replace(base, optim=replace(base.optim, batch_size=batch_size))


class OurCLIPStep(Step):
    """Weights of seed 0, and one batch of random images with captions of 1 to 15 words for every step.

    Args:
        config: the configuration, which gives the batch its size.
        dtype: dtype of autocast; None computes in float32.

    Raises:
        ModuleNotFoundError: open_clip is not installed.
    """

    name = "ours"

    def __init__(self, config: CLIPConfiguration, dtype: torch.dtype | None) -> None:
        self.config, model, pairs = config, config.model, config.optim.batch_size
        torch.manual_seed(0)
        self.towers = NewTowers(model, config.contrast.temperature).train()
        images = torch.randint(256, (pairs, 3, model.image_size, model.image_size), dtype=torch.uint8)
        words = _TEXT.split()
        captions = [" ".join(words[: 1 + i % len(words)]) for i in range(pairs)]
        self.batch = PairBatch(images, no_text(pairs), torch.arange(pairs), captions, step=0, epoch=0)
        o = config.optim
        self.optimizer = build_adamw(self.towers, LEARNING_RATE, (o.beta1, o.beta2), o.eps, o.wd)
        self.step = ContrastStep(self.towers, o.accum_freq, World(0, 1, 0, torch.device("cpu")), dtype)

    def gradient(self) -> dict[str, Tensor]:
        """Run forward and backward: return the loss, leave the gradients in the parameters."""
        return {"loss": self.step(self.batch)}

    def update(self) -> None:
        """Clip, take the optimiser's step and bound the temperature."""
        clip_grad_norm(self.towers.parameters(), self.config.optim.grad_clip_norm)
        self.optimizer.step()
        self.towers.clamp_temperature()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, call: int = 0) -> Tensor:
        """Run one training step as the trainer does; returns its loss."""
        with as_trained(self.config.run.deterministic):
            return super().__call__(call)

    def modules(self) -> list[nn.Module]:
        """Return open_clip's module, which holds all weights."""
        return [self.towers.clip]

    def inputs(self) -> list[Tensor]:
        """Return the images; captions are strings."""
        return [self.batch.images]


class OpenCLIPStep(Step):
    """The step of `ours` by open_clip's own model and loss: same weights, images, captions and optimiser.

    Both read the captions in every step. open_clip pads them to the context's length.

    Args:
        ours: the step whose weights are copied.
        dtype: dtype of autocast; None computes in float32.
        compiled: compile the blocks of both towers and the loss.
        exact: compute in float64, for the errors of the others.
    """

    def __init__(
        self, ours: OurCLIPStep, dtype: torch.dtype | None, compiled: bool = False, exact: bool = False
    ) -> None:
        self.name = "open_clip, compiled" if compiled else "open_clip, eager"
        self.config, self.batch, self.dtype = ours.config, ours.batch, dtype
        self.clip: Any = copy.deepcopy(ours.towers.clip)
        if exact:
            self.clip = self.clip.double()
        self.tokenizer = clip_tokenizer(ours.config.model)
        self.optimizer = plain_adamw(self.clip, ours.config.optim)
        self._loss = torch.compile(_contrast, dynamic=False) if compiled else _contrast
        if compiled:
            for transformer in (self.clip.visual.transformer, self.clip.transformer):
                for block in transformer.resblocks:
                    block.compile(dynamic=False)

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype is None else torch.autocast("cpu", dtype=self.dtype)

    def gradient(self) -> dict[str, Tensor]:
        """Run forward and backward: return the loss, leave the gradients in the parameters."""
        pixels = clip_pixels(self.batch.images, self.config.model).to(self.clip.logit_scale.dtype)
        with self._autocast():
            image = self.clip.encode_image(pixels, normalize=True)
            text = self.clip.encode_text(self.tokenizer(self.batch.captions), normalize=True)
        loss = self._loss(image, text, self.clip.logit_scale)
        loss.backward()
        return {"loss": loss.detach()}

    def update(self) -> None:
        """Clip, take the optimiser's step and bound the temperature."""
        nn.utils.clip_grad_norm_(self.clip.parameters(), self.config.optim.grad_clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            self.clip.logit_scale.clamp_(max=torch.tensor(MAX_LOGIT_SCALE).log().item())
        self.optimizer.zero_grad(set_to_none=True)

    def modules(self) -> list[nn.Module]:
        """Return open_clip's module."""
        return [self.clip]

    def inputs(self) -> list[Tensor]:
        """Return the images; captions are strings."""
        return [self.batch.images]


def _contrast(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """Compute open_clip's loss: two cross-entropies of the N x N logits."""
    logits = log_scale.exp() * wide(image) @ wide(text).T
    labels = torch.arange(logits.shape[0])
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
