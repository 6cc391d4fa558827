"""The loop of every training: resumable at any step, with the same bits whether interrupted or not."""

from __future__ import annotations

import dataclasses
import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from oner_fast.atomic import remove_leftovers
from oner_fast.data.batch import PairBatch
from oner_fast.data.workers import Batches
from oner_fast.train.config.common import Data, Optimisation, Precision, Run
from oner_fast.train.config.serialization import save_json, to_dict
from oner_fast.train.engine import checkpoint, lineage, phases
from oner_fast.train.engine.best import SCORE, Best, write_best
from oner_fast.train.engine.distributed import World, on_main, require_same, sum_over_ranks
from oner_fast.train.engine.metrics import MetricLog
from oner_fast.train.engine.nonfinite import NonFiniteGuard
from oner_fast.train.engine.optimizer import build_adamw, clip_grad_norm, load_moments, set_lr, step_unless
from oner_fast.train.engine.pace_watch import PaceWatch
from oner_fast.train.engine.precision import autocast_dtype
from oner_fast.train.engine.progress import Progress
from oner_fast.train.engine.random_state import seed_generators
from oner_fast.train.engine.resuming import find_start, restoring
from oner_fast.train.engine.run_lock import lost
from oner_fast.train.engine.schedule import cosine_lr
from oner_fast.train.engine.signals import StopRequest
from oner_fast.train.engine.threads import load, settle_threads
from oner_fast.train.engine.throughput import ThroughputMeter, gemm_rate, mfu
from oner_fast.train.engine.weights import Weights

# Settings of the run that may differ between ranks: those of a machine, and those that only rank 0 reads.
_OF_A_RANK = ("run_dir", "recipe", "device", "resume", "init_from", "collective_timeout")


class Configuration(Protocol):
    """The fields of a configuration (a dataclass of dataclasses) that the loop reads."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def data(self) -> Data: ...

    @property
    def optim(self) -> Optimisation: ...

    @property
    def run(self) -> Run: ...


C = TypeVar("C", bound=Configuration)


@dataclass(frozen=True)
class Gradient:
    """The loss and metrics of a step, returned once the gradient of the whole batch is in the parameters.

    Attributes:
        loss: 0-d, over all ranks.
        metrics: further metrics by name; 0-d tensors or numbers.
    """

    loss: Tensor
    metrics: dict[str, Tensor | float] = field(default_factory=dict)


class Training(ABC, Generic[C]):
    """A run, built from its configuration; `run` trains from the last checkpoint to the end.

    A subclass defines what is built, what a step computes and what is saved. The loop does the rest: learning rate,
    gradient norm, non-finite steps, checkpoints, signals, metrics and progress.
    """

    title: ClassVar[str]
    """The name shown before the progress bar."""
    config: C
    """The given configuration, completed by what the data or the checkpoint decided."""
    model_files: ClassVar[tuple[str, ...]] = ()
    """Names of the file that a finished run keeps its weights in, for `--init-from`; none where it is refused."""
    weights: Weights | None
    """The weights to begin with; None where they are new, or come from a checkpoint."""

    def __init__(self, config: C, world: World) -> None:
        self.world, self.folder = world, Path(config.run.run_dir)
        self.checkpoints = self.folder / "checkpoints"
        if config.optim.batch_size % (world.size * config.optim.accum_freq):
            raise ValueError(
                f"batch_size must be a multiple of ranks x accum_freq, got {config.optim.batch_size} for "
                f"{world.size} ranks and accum_freq {config.optim.accum_freq}"
            )
        # Every rank takes rank 0's choice, whatever the others' file systems show.
        self._start = on_main(world, lambda: find_start(self.checkpoints, config.run.resume))
        start = self._start.path
        self.weights = phases.weights_to_begin_with(config.run, self._start, self.model_files, self.title, world)
        state = None if start is None else checkpoint.load(start, world.device)
        before = None if state is None else phases.saved_configuration(str(start), state, type(config))
        self.dtype = autocast_dtype(config.run.precision, world.device)
        self.threads = settle_threads(
            config.run.threads,
            world,
            workers=config.data.workers,
            recorded=None if state is None else state.get("threads"),
            dtype=self.dtype or torch.float32,
        )
        precision: Precision = "fp32" if self.dtype is None else "amp_bf16"
        with restoring(start):
            self.config = self._resolve(replace(config, run=replace(config.run, precision=precision)), state)
        changes = [] if before is None else phases.differences(before, self.config)
        phase = self._start.foreign and (bool(changes) or phases.is_done(before, state))
        if start is not None and not self._start.foreign:
            phases.refuse_other_settings(start, self.folder, changes)
        self.lineage = [] if self.weights is None else self.weights.lineage
        if start is not None and state is not None:
            found = lineage.from_json(state.get("lineage", "[]"), str(start))
            self.lineage = phases.lineage_of(config.run, self._start, state, found, self.model_files, phase, world)
        seed_generators(config.run.seed)
        o = self.config.optim
        self.student = self._build().to(world.device).train()
        self.optimizer = build_adamw(self.student, o.lr, (o.beta1, o.beta2), o.eps, o.wd)
        self.guard = NonFiniteGuard(self.config.run.max_skipped_steps)
        self.best = Best()
        self.steps_done = 0
        if start is not None and state is not None and phase:
            with restoring(start):
                phases.refuse_other_parameters(start, state, self.student, self.optimizer, changes)
                self.student.load_state_dict(state["student"])
                self._load_extra_state(state)
                load_moments(self.optimizer, state["optimizer"])
            state = None
        if state is not None:
            with restoring(start):
                self.student.load_state_dict(state["student"])
                self._load_extra_state(state)
                self.optimizer.load_state_dict(state["optimizer"])
                self.guard.load_state_dict(state["guard"])
                checkpoint.set_random_state(state["random"])
                if state.get("best") is not None:
                    self.best.load_state_dict(state["best"])
                self.steps_done = int(state["step"])
        self.batches = self._open_batches()
        facts = _shared_facts(self.config) | {"samples": self.batches.state_dict().get("samples")}
        if self.weights is not None and world.size > 1:
            facts["weights"] = lineage.digest(self.weights.path)
        require_same(world, facts)
        if state is not None:
            with restoring(start):
                self.batches.load_state_dict(state["data"])
        self._ready()

    # A subclass defines these.

    @abstractmethod
    def _build(self) -> nn.Module:
        """Build the module whose parameters are trained; anything else that the step needs is kept aside."""

    @abstractmethod
    def _open_batches(self) -> Batches:
        """Open this rank's batches from step 0 on."""

    @abstractmethod
    def _gradient(self, batch: PairBatch) -> Gradient:
        """Leave the gradient of the whole batch, over all ranks and micro-batches, in the parameters."""

    @abstractmethod
    def _flops(self, batch: PairBatch) -> float:
        """Count the floating-point operations that this rank's part of the step needs, without recomputation."""

    @abstractmethod
    def _export(self, folder: Path) -> Path:
        """Write the trained model into `folder` and return its path; only the main rank calls this."""

    def _resolve(self, config: C, state: dict[str, Any] | None) -> C:
        """Fill in the fields of `config` that only the data or the checkpoint's `state` determine."""
        return config

    def _ready(self) -> None:
        """Make the step, once everything is built and restored."""

    def _extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside parameters, optimiser, data and random state."""
        return {}

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `_extra_state` returned."""

    def _updated(self, skip: Tensor) -> dict[str, Tensor | float]:
        """Do what follows each optimiser step, unless `skip` (0-d, on the device) is 1.0; return further metrics."""
        return {}

    def _evaluate(self) -> dict[str, float]:
        """Evaluate on held-out pairs, on every rank; return metrics, of which `SCORE` chooses the best model."""
        raise NotImplementedError

    @classmethod
    def without_traces(cls, config: C) -> C:
        """Return `config` with all output outside the run's folder turned off, for a dry run."""
        return config

    def _snapshot(self) -> dict[str, float]:
        """Record the state of the model that the report shows over time, and return metrics of it.

        Only the main rank calls this.
        """
        return {}

    # The loop.

    def run(self, stop: StopRequest) -> str | None:
        """Train to the last step. Return None when done, or the name of the signal that ended the run early."""
        c, total = self.config, self.config.optim.steps
        main = self.world.is_main
        on_main(self.world, self._prepare)
        meter, began = ThroughputMeter(), time.perf_counter()
        rate = gemm_rate(self.world.device, self.dtype or torch.float32)
        every, flops = c.run.log_every_n_steps, list[float]()
        watch = PaceWatch(None if self.world.device.type == "cuda" else self.threads.used, load)
        with (
            MetricLog(self.folder, resume_step=self.steps_done, enabled=main) as log,
            Progress(total, start=self.steps_done, every=every, title=self.title, enabled=main) as progress,
            self.batches,
        ):
            if main and self.steps_done == total:
                progress.note(phases.done_already(total, self.folder))
            elif main and self.steps_done:
                progress.note(f"resumed after step {self.steps_done}")
            elif main and self.lineage:
                progress.note(phases.beginning(self.lineage[-1]))
            if main and self.steps_done == 0 and (first := self._snapshot()):
                log.write(0, first)
            while self.steps_done < total:
                with meter.waiting():
                    batch = next(self.batches)
                metrics = self.step_once(batch)
                self.steps_done += 1
                meter.step(len(batch) * self.world.size)
                flops.append(self._flops(batch))
                recorded: dict[str, float] = {}
                if main and self._due(c.run.snapshot_every):
                    with meter.excluded():
                        recorded = self._snapshot()
                if self._due(c.run.eval_every):
                    with meter.excluded():
                        evaluated = self._evaluated()
                    recorded |= evaluated
                    progress.note(_said(self.steps_done, evaluated, self.best))
                if self._due(every):
                    pace = _pace(meter, flops, rate)
                    if pace.get("mfu", 0.0) > 1.0:  # the machine was busy with something else when it was measured
                        with meter.excluded():
                            better = gemm_rate(self.world.device, self.dtype or torch.float32, again=True)
                        pace["mfu"], rate = pace["mfu"] * rate / better, better
                    shown = _plain(metrics) | recorded | pace | self._counts(batch)
                    shown["seconds"] = time.perf_counter() - began
                    flops.clear()
                    log.write(self.steps_done, shown)
                    progress.update(self.steps_done, shown)
                    if pace and (fallen := watch.read(pace["samples_per_second"], pace["data_wait"])):
                        progress.note(fallen)
                else:
                    if recorded:
                        log.write(self.steps_done, recorded)
                    progress.update(self.steps_done, {})
                with meter.excluded():
                    asked = stop.agree(self.world)
                    if asked or self._due(c.run.save_every):
                        self._save()
                if asked and self.steps_done < total:
                    progress.note(f"{asked}: saved step {self.steps_done}; the same command continues from there")
                    return asked
        progress.note(on_main(self.world, self._finish))
        return None

    def _finish(self) -> str:
        """Write the trained model and return a line about its place and what comes next."""
        self._refuse_a_lost_folder()
        model = self._export(self.folder)
        return f"the model is {model}; next: oner-fast eval {self.folder}, oner-fast report {self.folder}"

    def _evaluated(self) -> dict[str, float]:
        """Evaluate, and keep the model where it is the best so far."""
        metrics = self._evaluate()
        # Rank 0 decides, as the same figures could differ in a last bit on another machine.
        if on_main(self.world, lambda: self.best.improved(metrics[SCORE], self.steps_done)):
            on_main(self.world, lambda: self._keep_best(metrics))
        return metrics

    def _keep_best(self, metrics: dict[str, float]) -> None:
        self._refuse_a_lost_folder()

        def export(folder: Path) -> None:
            save_json(self.config, folder / "config.json")  # what the model was trained on
            self._export(folder)

        write_best(self.folder, self.steps_done, metrics, export)

    def _prepare(self) -> None:
        """Make the run's folder ready for writing."""
        save_json(self.config, self.folder / "config.json")
        self.threads.save(self.folder)
        lineage.save(self.folder, self.lineage)
        checkpoint.prepare(self.checkpoints)
        for folder in (self.folder, self.folder / "snapshots"):
            remove_leftovers(folder)
        self._start.set_aside()

    def _due(self, every: int) -> bool:
        """Return whether work is due now that is done every `every` steps (0: never) and at the end."""
        return every > 0 and (self.steps_done % every == 0 or self.steps_done == self.config.optim.steps)

    def step_once(self, batch: PairBatch) -> dict[str, Tensor | float]:
        """Take one optimisation step and return its metrics, still on the device.

        The host waits for nothing but the end of the step before (see `oner_fast.train.engine.nonfinite`).
        """
        o = self.config.optim
        lr = cosine_lr(self.steps_done, peak=o.lr, total_steps=o.steps, warmup_steps=o.warmup, floor=o.min_lr)
        set_lr(self.optimizer, lr)
        result = self._gradient(batch)
        norm = clip_grad_norm(self.student.parameters(), o.grad_clip_norm)
        metrics: dict[str, Tensor | float] = {"loss": result.loss, **result.metrics, "lr": lr, "grad_norm": norm}
        skip = self.guard.vote(result.loss, norm)
        step_unless(skip, self.optimizer)
        metrics |= self._updated(skip)
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.settle()
        return metrics

    def _counts(self, batch: PairBatch) -> dict[str, float]:
        """Count epochs, steps skipped so far, and corrupt samples of all ranks since the run was started."""
        self.guard.settle(everything=True)  # the metrics beside these counts have waited for the step already
        corrupt = sum_over_ranks(torch.tensor(self.batches.corrupt))
        return {"epoch": batch.epoch, "skipped_steps": self.guard.skipped, "corrupt_samples": int(corrupt)}

    def _save(self) -> None:
        """Write a checkpoint from rank 0: whatever differs between ranks is a pure function of the step."""
        self.guard.settle(everything=True)
        on_main(self.world, self._write_checkpoint)

    def _refuse_a_lost_folder(self) -> None:
        if not self.folder.is_dir():  # it must not come back with a checkpoint alone
            raise FileNotFoundError(
                f"the run folder {self.folder} is gone: it was moved or removed during the run; put it back, and the "
                "same command continues from its last checkpoint"
            )
        if lost(self.folder):
            raise FileNotFoundError(
                f"another folder took the place of the run folder {self.folder} during the run, and nothing was "
                "written into it; the checkpoints are where the run's folder was moved to"
            )

    def _write_checkpoint(self) -> None:
        self._refuse_a_lost_folder()
        state: dict[str, Any] = {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state_dict(),
            "data": self.batches.state_dict(),
            "config": json.dumps(to_dict(self.config)),
            "random": checkpoint.random_state(),
            "threads": self.threads.used,
            "lineage": lineage.to_json(self.lineage),
            "best": self.best.state_dict(),
        }
        state |= self._extra_state()
        keep = self.config.run.keep_checkpoints
        checkpoint.save(self.checkpoints, self.steps_done, state, keep, damaged=self._start.damaged)


def _said(step: int, metrics: dict[str, float], best: Best) -> str:
    """Say in one line what an evaluation found."""
    found = f"step {step}: mean recall {metrics[SCORE]:.4f}" if metrics else f"step {step}"
    return f"{found}, the best so far" if best.step == step else f"{found} (best: {best.score:.4f} at step {best.step})"


def _plain(metrics: dict[str, Tensor | float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _pace(meter: ThroughputMeter, flops: list[float], rate: float) -> dict[str, float]:
    """Read samples a second, data wait and MFU since the last reading; nothing where no step has counted yet."""
    pace = meter.read()
    if pace is None:
        return {}
    return {
        "samples_per_second": pace.samples_per_second,
        "data_wait": pace.data_wait,
        "mfu": mfu(sum(flops[-pace.steps :]), pace.seconds, rate),
    }


def _shared_facts(config: Configuration) -> dict[str, Any]:
    """Return the settings that must be equal on every rank, by name; paths and the pace of a rank are its own."""
    free = {"data": phases.FREE_DATA, "run": _OF_A_RANK}
    return {
        each.name if part.name in ("data", "optim", "run") else f"{part.name}.{each.name}": repr(
            getattr(getattr(config, part.name), each.name)
        )
        for part in dataclasses.fields(config)
        for each in dataclasses.fields(getattr(config, part.name))
        if each.name not in free.get(part.name, ())
    }
