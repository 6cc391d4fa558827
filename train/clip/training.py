"""The contrastive training of two towers, and its form as a CLIP from scratch or as UTA's second stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from oner_fast.data.batch import PairBatch
from oner_fast.data.workers import Batches
from oner_fast.evaluation.modality_gap import modality_gap
from oner_fast.models.clip import WEIGHTS
from oner_fast.train.clip.flops import step_flops
from oner_fast.train.clip.inputs import ContrastInputs
from oner_fast.train.clip.settings import CLIPConfiguration
from oner_fast.train.clip.step import ContrastStep
from oner_fast.train.clip.towers import NewTowers, TwoTowers, build_towers
from oner_fast.train.config.common import SameCaption
from oner_fast.train.engine.batches import BatchConfiguration, open_batches
from oner_fast.train.engine.loop import Configuration, Gradient, Training
from oner_fast.train.engine.snapshots import Embedded, Snapshots
from oner_fast.train.engine.throughput import FORWARD_AND_BACKWARD
from oner_fast.train.periodic_evaluation import PeriodicEvaluation, TrainedEncoder


class ContrastConfiguration(Configuration, BatchConfiguration, Protocol):
    """The fields of a contrastive configuration that the training reads."""


C = TypeVar("C", bound=ContrastConfiguration)


class TwoTowerTraining(Training[C]):
    """Contrast images with their captions: both towers' embeddings normalised, both directions (CLIP)."""

    student: TwoTowers
    _snapshots: Snapshots | None = None

    def _open_batches(self) -> Batches:
        prepare = ContrastInputs(self.config.optim.accum_freq, self.student.reader())
        return open_batches(self.config, None, self.world, prepare=prepare)

    def _ready(self) -> None:
        self.step = ContrastStep(
            self.student, self.config.optim.accum_freq, self.world, self.dtype, self._same_caption()
        )
        self._pair_flops = self._forward_flops()
        c = self.config
        if c.run.eval_every:
            self._evaluation = PeriodicEvaluation(c.data, c.run, self.world, self.student, self._encoder())
        if self.world.is_main:
            self._snapshots = Snapshots(c.data, c.run, c.model.image_size, self.folder, self._embed)

    def _same_caption(self) -> SameCaption:
        return "negative"

    def _gradient(self, batch: PairBatch) -> Gradient:
        loss = self.step(batch)
        scale = self.student.log_logit_scale.detach().exp()
        return Gradient(loss, {"logit_scale": scale, "repeated_captions": self.step.repeated_captions})

    def _updated(self, skip: Tensor) -> dict[str, Tensor | float]:
        self.student.clamp_temperature()
        return {}

    def _flops(self, batch: PairBatch) -> float:
        return FORWARD_AND_BACKWARD * self._pair_flops * len(batch)

    def _snapshot(self) -> dict[str, float]:
        return {} if self._snapshots is None else self._snapshots.take(self.steps_done)

    def _embed(self, images: Tensor, captions: list[str]) -> Embedded:
        """Embed pairs in the towers' joint space, which is their projection."""
        device, training = self.world.device, self.student.training
        self.student.eval()
        found = self.student(images.to(device), self.student.read(captions).to(device))
        self.student.train(training)
        return Embedded(found.image, found.text, {"projection": modality_gap(found.image, found.text)})

    def _evaluate(self) -> dict[str, float]:
        return self._evaluation()

    def _encoder(self) -> TrainedEncoder:
        side, device = self.config.model.image_size, self.world.device
        blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)

        def images(pixels: Tensor) -> Tensor:
            image: Tensor = self.student(pixels, self.student.read(["a"]).to(device)).image
            return image

        def texts(captions: list[str]) -> Tensor:
            text: Tensor = self.student(blank, self.student.read(captions).to(device)).text
            return text

        return TrainedEncoder(side, device, images, texts)

    def _export(self, folder: Path) -> Path:
        self.student.save(folder)
        return folder

    def _extra_state(self) -> dict[str, Any]:
        return dict(self.student.about())

    def _forward_flops(self) -> float:
        """Count the operations of one pair's forward; the contrast adds less than a hundredth."""
        side = self.config.model.image_size
        images = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.world.device)
        texts = self.student.read(["a"]).to(self.world.device)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.student(images, texts)
        return float(counter.get_total_flops())


class CLIPTraining(TwoTowerTraining[CLIPConfiguration]):
    """A CLIP from scratch, or an aligned student against its teacher's text tower."""

    title = "clip"
    model_files = (WEIGHTS,)

    def _build(self) -> nn.Module:
        return build_towers(self.config, self.world.device, None if self.weights is None else self.weights.path)

    def _flops(self, batch: PairBatch) -> float:
        if isinstance(self.student, NewTowers):
            return step_flops(self.student.config, self.step.lengths, self.config.optim.batch_size)
        return super()._flops(batch)

    def _same_caption(self) -> SameCaption:
        return self.config.contrast.same_caption
