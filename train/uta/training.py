"""The training of a ViT whose visible tokens are aligned to a frozen CLIP's (UTA)."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oner_fast.data.batch import PairBatch
from oner_fast.data.loader import PairLoader
from oner_fast.data.workers import Batches
from oner_fast.models.files import save_uta
from oner_fast.models.teacher import load_teacher
from oner_fast.models.uta import UTA
from oner_fast.train.engine.batches import open_batches
from oner_fast.train.engine.loop import Gradient, Training
from oner_fast.train.uta.flops import student_flops, teacher_flops
from oner_fast.train.uta.inputs import AlignmentInputs
from oner_fast.train.uta.settings import UTAConfiguration
from oner_fast.train.uta.starting_weights import starting_student
from oner_fast.train.uta.step import AlignmentStep
from oner_fast.train.uta.teacher_cache import FeatureCache, feature_key
from oner_fast.train.uta.teacher_features import TeacherFeatures


class UTATraining(Training[UTAConfiguration]):
    """UTA and its comparison rows. No caption is ever read."""

    title = "uta"
    model_files = ("model.safetensors",)
    student: UTA

    def _build(self) -> nn.Module:
        alignment, model = self.config.alignment, self.config.model
        if self.config.run.eval_every:
            raise ValueError(
                "--eval-every measures retrieval and zero-shot classification, and no caption is read here; leave it "
                "out, and run `oner-fast eval` after the training"
            )
        if not alignment.teacher:
            raise ValueError(
                "UTA needs a teacher: --teacher RUN of `oner-fast train clip` or `train lit`, or an open_clip "
                "name:weights"
            )
        half = alignment.teacher_precision == "bf16" or (
            alignment.teacher_precision == "auto" and self.dtype is not None
        )
        self.teacher = load_teacher(
            alignment.teacher,
            grid=model.grid,
            device=self.world.device,
            dtype=torch.bfloat16 if half else torch.float32,
        )
        if self.teacher.embed_dim != model.embed_dim:
            raise ValueError(
                f"the teacher {alignment.teacher} has tokens of {self.teacher.embed_dim} numbers, the student of "
                f"{model.embed_dim}: give --embed-dim {self.teacher.embed_dim}"
            )
        return UTA(model) if self.weights is None else starting_student(self.weights.path, model)

    def _open_batches(self) -> Batches:
        return open_batches(self.config, None, self.world, captions=False, prepare=AlignmentInputs(self.config))

    def _ready(self) -> None:
        features = self._features = TeacherFeatures(self.teacher, self._cache())
        if features.overlaps:
            self.batches.ahead = features.submit
        self.step = AlignmentStep(self.config, self.student, features, self.world, self.dtype)
        self._teacher_flops, self._computed = teacher_flops(self.teacher, self.config.model.image_size), 0

    @classmethod
    def without_traces(cls, config: UTAConfiguration) -> UTAConfiguration:
        """Turn off the cache of the teacher's tokens."""
        return replace(config, alignment=replace(config.alignment, teacher_cache=""))

    def _cache(self) -> FeatureCache | None:
        alignment, batches = self.config.alignment, self.batches
        if not alignment.teacher_cache:
            return None
        if not isinstance(batches, PairLoader):
            raise ValueError("teacher_cache needs tars on disk: the order of streamed data is never the same again")
        source = batches.source
        key = feature_key(
            self.teacher, source.dataset, source.transform, seed=batches.seed, batch_size=batches.batch_size
        )
        shape = (1 + self.teacher.grid**2, self.teacher.embed_dim)
        return FeatureCache(alignment.teacher_cache, key, shape=shape, dtype=alignment.teacher_cache_dtype)

    def _gradient(self, batch: PairBatch) -> Gradient:
        return Gradient(self.step(batch))

    def _flops(self, batch: PairBatch) -> float:
        # A step that took the teacher's tokens from the cache needed no operation for them.
        computed = self._features.computed > self._computed
        self._computed = self._features.computed
        return (student_flops(self.config) + computed * self._teacher_flops) * len(batch)

    def _export(self, folder: Path) -> Path:
        path = folder / "model.safetensors"
        save_uta(path, self.student, self._about())
        return path

    def _extra_state(self) -> dict[str, Any]:
        return {"kind": "oner_fast.uta", "model_config": json.dumps(asdict(self.config.model)), **self._about()}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        if state["teacher_fingerprint"] != self.teacher.fingerprint:
            raise ValueError(
                f"the run was trained with another teacher than {self.config.alignment.teacher} now holds; "
                "--init-from RUN in a new --run-dir begins with its weights alone"
            )

    def _about(self) -> dict[str, str]:
        return {"teacher": self.config.alignment.teacher, "teacher_fingerprint": self.teacher.fingerprint}
