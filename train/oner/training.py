"""The training of OneR: its step, its moving-average teacher, and its snapshots."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from oner_fast.atomic import write_atomic
from oner_fast.data.batch import PairBatch
from oner_fast.data.coverage import coverage
from oner_fast.data.dataset import PairDataset
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.data.workers import Batches
from oner_fast.evaluation.spaces import gaps, image_columns, text_columns
from oner_fast.models.contrast import FILE as CONTRAST_FILE
from oner_fast.models.contrast import Contrast, save_contrast
from oner_fast.models.files import model_bytes
from oner_fast.models.oner import OneR
from oner_fast.train.engine.batches import build_tokenizer, is_stream, open_batches
from oner_fast.train.engine.distributed import on_main
from oner_fast.train.engine.loop import Gradient, Training
from oner_fast.train.engine.schedule import teacher_momentum
from oner_fast.train.engine.snapshots import Embedded, Snapshots
from oner_fast.train.oner.ema import build_teacher, update_teacher
from oner_fast.train.oner.flops import step_flops
from oner_fast.train.oner.inputs import StepInputs
from oner_fast.train.oner.settings import OneRConfiguration
from oner_fast.train.oner.starting_weights import StartingWeights, read_starting_weights
from oner_fast.train.oner.step import TrainingStep
from oner_fast.train.oner.student import Student
from oner_fast.train.periodic_evaluation import PeriodicEvaluation, TrainedEncoder

_log = logging.getLogger(__name__)


class OneRTraining(Training[OneRConfiguration]):
    """OneR and its comparison rows."""

    title = "oner"
    model_files = ("model.safetensors",)
    student: Student
    _starting: StartingWeights | None = None
    _snapshots: Snapshots | None = None

    @property
    def exported(self) -> OneR:
        """The tower that is evaluated and saved: the student's, as MoCo keeps its query encoder."""
        return self.student.tower

    def _resolve(self, config: OneRConfiguration, state: dict[str, Any] | None) -> OneRConfiguration:
        saved = None if state is None else state["tokenizer"]
        if self.weights is not None:
            self._starting = read_starting_weights(self.weights.path)
            saved = self._given_tokenizer(config, self._starting)
        self.tokenizer = self._tokenizer(config, saved)
        return replace(config, model=replace(config.model, vocab_size=self.tokenizer.vocab_size))

    def _build(self) -> nn.Module:
        student = Student(self.config.model, self.config.objectives).to(self.world.device)
        starting, self._starting = self._starting, None
        if starting is not None:
            said = starting.fill(student)
            if self.world.is_main:
                _log.info("%s", said)
        self.teacher = build_teacher(student.tower) if self.config.objectives.momentum_teacher else None
        if starting is not None and self.teacher is not None:
            starting.fill_teacher(self.teacher)
        return student

    def _open_batches(self) -> Batches:
        return open_batches(
            self.config,
            self.tokenizer,
            self.world,
            max_tokens=self.config.model.max_text_tokens,
            second_view=self.config.objectives.teacher_view == "second",
            prepare=StepInputs(self.config, self.tokenizer),
        )

    def _ready(self) -> None:
        self.step = TrainingStep(self.config, self.student, self.teacher, self.tokenizer, self.world, self.dtype)
        c = self.config
        if c.run.eval_every:
            self._evaluation = PeriodicEvaluation(c.data, c.run, self.world, self.exported, self._encoder())
        if self.world.is_main:
            self._snapshots = Snapshots(c.data, c.run, c.model.image_size, self.folder, self._embed)

    def _gradient(self, batch: PairBatch) -> Gradient:
        result = self.step(batch)
        metrics: dict[str, Tensor | float] = {f"loss/{name}": value for name, value in result.parts.items()}
        metrics["repeated_captions"] = result.repeated_captions
        if self.config.objectives.learnable_temperature and self.config.objectives.contrastive:
            metrics["logit_scale"] = self.student.log_logit_scale.detach().exp()
        return Gradient(result.loss, metrics)

    def _updated(self, skip: Tensor) -> dict[str, Tensor | float]:
        self.student.clamp_temperature()
        if self.teacher is None:
            return {}
        momentum = teacher_momentum(
            self.steps_done, total_steps=self.config.optim.steps, start=self.config.objectives.momentum
        )
        update_teacher(self.teacher, self.student.tower, momentum, skip)
        return {"momentum": momentum}

    def _flops(self, batch: PairBatch) -> float:
        return step_flops(self.config, batch)

    def _snapshot(self) -> dict[str, float]:
        return {} if self._snapshots is None else self._snapshots.take(self.steps_done)

    def _embed(self, images: Tensor, captions: list[str]) -> Embedded:
        """Embed unmasked pairs in every space of the evaluation."""
        device = self.world.device
        text = self.tokenizer(captions, self.config.model.max_text_tokens).to(device)
        training = self.student.training
        self.student.eval()
        image, words = (
            image_columns(self.student.tower, self.contrast, images.to(device)),
            text_columns(self.student.tower, self.contrast, text),
        )
        self.student.train(training)
        return Embedded(image["projection"], words["projection"], gaps(image, words))

    @property
    def contrast(self) -> Contrast:
        """The predictors and the teacher."""
        return replace(self.student.contrast, teacher=self.teacher)

    def _evaluate(self) -> dict[str, float]:
        return self._evaluation()

    def _encoder(self) -> TrainedEncoder:
        def texts(captions: list[str]) -> Tensor:
            text = self.tokenizer(captions, self.config.model.max_text_tokens).to(self.world.device)
            return self.exported.encode_text(text.input_ids, text.cu_seqlens)

        return TrainedEncoder(self.config.model.image_size, self.world.device, self.exported.encode_image, texts)

    def _export(self, folder: Path) -> Path:
        scale = float(self.student.log_logit_scale)
        path, model = folder / "model.safetensors", model_bytes(self.exported, self.tokenizer.to_json(), scale)
        # First, so that a model is never without it.
        save_contrast(folder / CONTRAST_FILE, self.contrast, hashlib.sha256(model).hexdigest())
        write_atomic(path, lambda file: file.write(model))
        return path

    def _extra_state(self) -> dict[str, Any]:
        return {
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "model_config": json.dumps(asdict(self.config.model)),
            "tokenizer": self.tokenizer.to_json(),
        }

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        if self.teacher is not None:
            # A new phase may begin to average where its source did not.
            self.teacher.load_state_dict(state["teacher"] or self.student.tower.state_dict())

    def _tokenizer(self, config: OneRConfiguration, saved: str | None) -> Tokenizer:
        """Take the checkpoint's tokenizer, or let rank 0 learn or load one; save it in the run's folder."""
        path = self.folder / "tokenizer.json"

        def write() -> None:
            tokenizer = build_tokenizer(config.data) if saved is None else Tokenizer.from_json(saved)
            self.folder.mkdir(parents=True, exist_ok=True)
            tokenizer.save(path)

        on_main(self.world, write)
        return Tokenizer.load(path)

    def _given_tokenizer(self, config: OneRConfiguration, starting: StartingWeights) -> str:
        """Return the tokenizer that comes with the weights, as JSON, and log how it reads the training captions."""
        data, text = config.data, starting.tokenizer.to_json()
        if config.objectives.init_gap:
            raise ValueError("init_gap moves new positions: leave it out where --init-from gives trained ones")
        if data.tokenizer != "train" and Tokenizer.load(data.tokenizer).to_json() != text:
            raise ValueError(
                f"the model in {starting.name} embeds the words of its own tokenizer, and {data.tokenizer} holds "
                "another; leave out --tokenizer, or give --tokenizer train"
            )
        if self.world.is_main and not is_stream(data.train_data):
            captions = PairDataset(data.train_data, data.train_split).captions()
            _log.info("the tokenizer of %s is taken: %s", starting.name, coverage(starting.tokenizer, captions))
        return text
