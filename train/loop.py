"""The training of a tower: resumable at any step, the same bits whether interrupted or not."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from oner_fast.data.batch import PairBatch
from oner_fast.data.tokenizer import Tokenizer
from oner_fast.models.files import save_model
from oner_fast.models.oner import OneR
from oner_fast.train import checkpoint
from oner_fast.train import config as configuration
from oner_fast.train.cost import step_flops
from oner_fast.train.distributed import World, barrier, sum_over_ranks
from oner_fast.train.ema import build_teacher, update_teacher
from oner_fast.train.feed import build_tokenizer, open_batches
from oner_fast.train.flops import ThroughputMeter, gemm_rate, mfu
from oner_fast.train.metrics import MetricLog
from oner_fast.train.nonfinite import NonFiniteGuard
from oner_fast.train.optim import build_adamw, clip_grad_norm, set_lr
from oner_fast.train.precision import autocast_dtype
from oner_fast.train.progress import Progress
from oner_fast.train.random_state import seed_generators
from oner_fast.train.schedule import cosine_lr, teacher_momentum
from oner_fast.train.settings import OneRTraining
from oner_fast.train.signals import StopRequest
from oner_fast.train.snapshots import Snapshots
from oner_fast.train.step import TrainingStep
from oner_fast.train.student import Student

_log = logging.getLogger(__name__)


class Training:
    """Everything a run holds, built from its configuration; :meth:`run` trains from the last checkpoint to the end."""

    def __init__(self, config: OneRTraining, world: World) -> None:
        self.world, self.folder = world, Path(config.run.run_dir)
        self.checkpoints = self.folder / "checkpoints"
        if config.optim.batch_size % (world.size * config.optim.accum_freq):
            raise ValueError(
                f"batch_size must be a multiple of ranks x accum_freq, got {config.optim.batch_size} for "
                f"{world.size} ranks and accum_freq {config.optim.accum_freq}"
            )
        start = checkpoint.resolve(self.checkpoints, config.run.resume)
        _refuse_to_overwrite(self.checkpoints, start)
        state = None if start is None else checkpoint.load(start, world.device)
        self.tokenizer = self._tokenizer(config, None if state is None else state["tokenizer"])
        self.dtype = autocast_dtype(config.run.precision, world.device)
        self.config = replace(
            config,
            model=replace(config.model, vocab_size=self.tokenizer.vocab_size),
            run=replace(config.run, precision="fp32" if self.dtype is None else "amp_bf16"),
        )
        if state is not None:
            _refuse_other_configuration(str(start), state["config"], self.config)
        seed_generators(config.run.seed)
        student = Student(self.config.model, config.objectives)
        self.student = student.to(world.device).train()
        self.teacher = build_teacher(self.student.tower) if config.objectives.momentum_teacher else None
        self.optimizer = build_adamw(
            self.student, config.optim.lr, (config.optim.beta1, config.optim.beta2), config.optim.eps, config.optim.wd
        )
        self.guard = NonFiniteGuard(config.run.max_skipped_steps)
        self.steps_done = 0
        if state is not None:
            self._restore(state)
        self.batches = open_batches(self.config, self.tokenizer, world)
        if state is not None:
            self.batches.load_state_dict(state["data"])
        self.step = TrainingStep(self.config, self.student, self.teacher, self.tokenizer, world, self.dtype)

    @property
    def exported(self) -> OneR:
        """The tower that is evaluated and saved: the student's, as MoCo keeps its query encoder."""
        return self.student.tower

    def run(self, stop: StopRequest) -> str | None:
        """Train to the last step. Returns None when done, or the name of the signal that ended the run early."""
        c, total = self.config, self.config.optim.steps
        if self.world.is_main:
            configuration.save_json(c, self.folder / "config.json")
            checkpoint.prepare(self.checkpoints)
        main = self.world.is_main
        snapshots = Snapshots(c, self.folder, self.tokenizer, self.exported) if main else None
        meter, began = ThroughputMeter(), time.perf_counter()
        rate = gemm_rate(self.world.device, self.dtype or torch.float32)
        every, flops = c.run.log_every_n_steps, list[float]()
        with (
            MetricLog(self.folder, resume_step=self.steps_done, enabled=main) as log,
            Progress(total, start=self.steps_done, every=every, title="oner", enabled=main) as progress,
            self.batches,
        ):
            if main and self.steps_done:
                progress.note(f"resumed after step {self.steps_done}")
            if snapshots is not None and self.steps_done == 0:
                snapshots.take(0)
            while self.steps_done < total:
                with meter.waiting():
                    batch = next(self.batches)
                metrics = self._step(batch)
                self.steps_done += 1
                meter.step(len(batch) * self.world.size)
                flops.append(step_flops(c, batch))
                if self._due(every):
                    shown = _plain(metrics) | _pace(meter, flops, rate) | self._counts(batch)
                    shown["seconds"] = time.perf_counter() - began
                    flops.clear()
                    log.write(self.steps_done, shown)
                    progress.update(self.steps_done, shown)
                else:
                    progress.update(self.steps_done, {})
                with meter.excluded():
                    asked = stop.agree(self.world)
                    if snapshots is not None and self._due(c.run.snapshot_every):
                        snapshots.take(self.steps_done)
                    if asked or self._due(c.run.save_every):
                        self._save()
                if asked and self.steps_done < total:
                    progress.note(f"{asked}: saved step {self.steps_done}; the same command goes on from there")
                    return asked
        if main:
            save_model(self.folder / "model.safetensors", self.exported, self.tokenizer.to_json())
        barrier()
        return None

    def _due(self, every: int) -> bool:
        """Whether what happens ``every`` so many steps (0: never), and at the end, happens now."""
        return every > 0 and (self.steps_done % every == 0 or self.steps_done == self.config.optim.steps)

    def _step(self, batch: PairBatch) -> dict[str, torch.Tensor | float]:
        """One optimisation step; its metrics, still on the device."""
        o = self.config.optim
        lr = cosine_lr(self.steps_done, peak=o.lr, total_steps=o.steps, warmup_steps=o.warmup, floor=o.min_lr)
        momentum = teacher_momentum(self.steps_done, total_steps=o.steps, start=self.config.objectives.momentum)
        set_lr(self.optimizer, lr)
        result = self.step(batch)
        norm = clip_grad_norm(self.student.parameters(), o.grad_clip_norm)
        if self.guard.check(result.loss, norm):
            self.optimizer.step()
            self.student.clamp_temperature()
            if self.teacher is not None:
                update_teacher(self.teacher, self.student.tower, momentum)
        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, torch.Tensor | float] = {"loss": result.loss}
        metrics |= {f"loss/{name}": value for name, value in result.parts.items()}
        metrics |= {"lr": lr, "grad_norm": norm, "momentum": momentum}
        if result.modality_gap is not None:
            metrics["modality_gap"] = result.modality_gap
        return metrics

    def _counts(self, batch: PairBatch) -> dict[str, float]:
        """Epoch, steps skipped so far, and corrupt samples that all ranks have met since the run was started."""
        corrupt = sum_over_ranks(torch.tensor(self.batches.corrupt))
        return {"epoch": batch.epoch, "skipped_steps": self.guard.skipped, "corrupt_samples": int(corrupt)}

    def _tokenizer(self, config: OneRTraining, saved: str | None) -> Tokenizer:
        """The checkpoint's where the run is resumed; else learnt or loaded, by rank 0 alone. Saved beside the run."""
        path = self.folder / "tokenizer.json"
        if self.world.is_main:
            tokenizer = build_tokenizer(config.data) if saved is None else Tokenizer.from_json(saved)
            self.folder.mkdir(parents=True, exist_ok=True)
            tokenizer.save(path)
        barrier()
        return Tokenizer.load(path)

    def _save(self) -> None:
        """Rank 0 writes; what differs between ranks is a pure function of the step."""
        if self.world.is_main:
            state: dict[str, Any] = {
                "student": self.student.state_dict(),
                "teacher": None if self.teacher is None else self.teacher.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "guard": self.guard.state_dict(),
                "data": self.batches.state_dict(),
                "config": json.dumps(configuration.to_dict(self.config)),
                "random": checkpoint.random_state(),
                "model_config": json.dumps(asdict(self.config.model)),
                "tokenizer": self.tokenizer.to_json(),
            }
            checkpoint.save(self.checkpoints, self.steps_done, state, self.config.run.keep_checkpoints)
        barrier()

    def _restore(self, state: dict[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        if self.teacher is not None:
            self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state["guard"])
        checkpoint.set_random_state(state["random"])
        self.steps_done = int(state["step"])


def _plain(metrics: dict[str, torch.Tensor | float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _pace(meter: ThroughputMeter, flops: list[float], rate: float) -> dict[str, float]:
    """Samples a second, data wait and MFU since the last reading; nothing where no step has counted yet."""
    pace = meter.read()
    if pace is None:
        return {}
    return {
        "samples_per_second": pace.samples_per_second,
        "data_wait": pace.data_wait,
        "mfu": mfu(sum(flops[-pace.steps :]), pace.seconds, rate),
    }


def _refuse_to_overwrite(checkpoints: Path, start: Path | None) -> None:
    """A folder with checkpoints goes on from its newest or not at all: later ones would be taken for this run's."""
    existing = checkpoint.saved(checkpoints)
    if existing and (start is None or start.resolve() != existing[-1].resolve()):
        raise ValueError(
            f"{checkpoints} holds {len(existing)} checkpoints up to {existing[-1].name}; "
            "resume with --resume latest, or give another --run-dir"
        )


def _refuse_other_configuration(name: str, saved: str, config: OneRTraining) -> None:
    """A resumed run must learn the same thing: everything but the place, the pace and the bookkeeping has to agree."""
    before_all = configuration.from_dict(OneRTraining, json.loads(saved))
    differences = []
    for part in dataclasses.fields(OneRTraining):
        before, now = getattr(before_all, part.name), getattr(config, part.name)
        for field in dataclasses.fields(before):
            if part.name == "run" and field.name not in ("seed", "precision"):
                continue
            if part.name == "data" and field.name in ("workers", "train_data", "tokenizer"):
                continue
            if getattr(before, field.name) != getattr(now, field.name):
                differences.append(f"{field.name} {getattr(before, field.name)!r} -> {getattr(now, field.name)!r}")
    if differences:
        raise ValueError(f"{name} was trained with other settings ({'; '.join(differences)}); give another --run-dir")
