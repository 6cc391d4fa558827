"""The plain step with our weights and masks, which the eager and the compiled baseline run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from oner_fast.benchmarks.step.baseline_model import Batch, Block, Masks, PlainModel, Tower, teacher_keys
from oner_fast.benchmarks.step.names import plain_name
from oner_fast.benchmarks.step.ours import OurStep
from oner_fast.benchmarks.step.setting import MOMENTUM, Words
from oner_fast.benchmarks.step.steps import Step, plain_adamw
from oner_fast.data.batch import PairBatch
from oner_fast.models.oner import OneR
from oner_fast.train.oner.inputs import StudentInput, student_input
from oner_fast.train.oner.student import Student


def _copy(source: nn.Module, target: nn.Module) -> None:
    theirs = dict(target.named_parameters())
    ours = {plain_name(name): parameter for name, parameter in source.named_parameters()}
    ours.pop("log_logit_scale", None)
    if ours.keys() != theirs.keys():
        raise ValueError(f"the models differ in {sorted(ours.keys() ^ theirs.keys())}")
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name].view_as(parameter))


def plain_model(student: Student) -> PlainModel:
    """Make the plain model with the weights of `student`.

    Raises:
        ValueError: the plain step does not cover `student`: it needs one trunk, one head, and every loss except CIC.
    """
    if student.predictor is None:
        raise ValueError("the plain step has a predictor, and the student has none")
    model = PlainModel(student.tower.config, student.predictor[0].out_features)  # type: ignore[arg-type]
    _copy(student, model)
    return model


def plain_teacher(teacher: OneR) -> Tower:
    """Make the plain tower with the weights of `teacher`, without gradients."""
    tower = Tower(teacher.config)
    _copy(teacher, tower)
    return tower.requires_grad_(False)


def _padded(values: Tensor, lengths: list[int], longest: int) -> Tensor:
    rows = [nn.functional.pad(part, (0, longest - part.shape[0])) for part in values.split(lengths)]
    return torch.stack(rows)


def plain_batch(batch: PairBatch, masked: StudentInput) -> Batch:
    """Pad `batch` to its longest caption, with the same masks as our step."""
    lengths = batch.text.lengths.tolist()
    longest = max(lengths)
    padding = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    places = padding.flatten().nonzero().squeeze(1)
    passes = {each.name: each for each in masked.passes}

    def masks(text: str, image: str) -> Masks:
        words, patches = passes[text].text, masked.patches[image]  # type: ignore[index]
        if words is None:
            raise ValueError(f"the pass {text} shows no words")
        word_ids = _padded(words.input_ids, lengths, longest)
        rows = places.index_select(0, masked.words[text].rows)  # type: ignore[index]
        return Masks(word_ids, rows, patches, patches.flatten().nonzero().squeeze(1))

    word_ids = _padded(batch.text.input_ids, lengths, longest)
    return Batch(batch.images, word_ids, padding, masks("text", "image"), masks("image_text", "image_text"))


class PlainStep(Step):
    """The step of `ours` in plain PyTorch: same weights, masks, losses, optimiser and momentum.

    Args:
        ours: the step whose weights are copied.
        dtype: dtype of autocast; None computes in float32.
        compiled: compile each transformer block (one graph for each of its shapes, no dynamic ones) and the masked
            losses. The optimiser is then PyTorch's fused one, and one _foreach call moves the teacher.
        exact: compute in float64, for the errors of the others.
    """

    def __init__(self, ours: OurStep, dtype: torch.dtype | None, compiled: bool = False, exact: bool = False) -> None:
        self.name = "plain, compiled" if compiled else "plain, eager"
        config = self.config = ours.config
        self.dtype = dtype
        masked = student_input(
            ours.batch, config.objectives, config.model, config.run.seed, Words(config.model.vocab_size)
        )
        self.batch = plain_batch(ours.batch, masked)
        self.student, self.teacher = plain_model(ours.student), plain_teacher(ours.teacher)
        if exact:
            self.student, self.teacher = self.student.double(), self.teacher.double()
        self.optimizer = plain_adamw(self.student, config.optim)
        if compiled:
            # Lengths, dtypes and gradients give a block more than the 8 forms after which compilation stops.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            for module in (self.student, self.teacher):
                for block in module.modules():
                    if isinstance(block, Block):
                        block.compile(dynamic=False)
            self.student.compile_losses()

    def _autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype is None else torch.autocast("cpu", dtype=self.dtype)

    def gradient(self) -> dict[str, Tensor]:
        """Run forward and backward: return the losses by name (0-d), leave the gradients in the parameters."""
        objectives = self.config.objectives
        with self._autocast():
            keys = teacher_keys(self.teacher, self.batch)
            losses = self.student(self.batch, keys, 1 / objectives.temperature)
        loss = torch.stack([getattr(objectives, name) * value for name, value in losses.items()]).sum()
        loss.backward()
        return {"loss": loss.detach(), **{name: value.detach() for name, value in losses.items()}}

    def update(self) -> None:
        """Clip, take the optimiser's step and move the teacher."""
        nn.utils.clip_grad_norm_(self.student.parameters(), self.config.optim.grad_clip_norm)
        self.optimizer.step()
        with torch.no_grad():
            student: list[Tensor] = list(self.student.tower.parameters())
            teacher: list[Tensor] = list(self.teacher.parameters())
            torch._foreach_lerp_(teacher, student, 1.0 - MOMENTUM)
        self.optimizer.zero_grad(set_to_none=True)

    def modules(self) -> list[nn.Module]:
        """Return the student and the teacher."""
        return [self.student, self.teacher]

    def inputs(self) -> list[Tensor]:
        """Return the padded batch and its masks."""
        batch = self.batch
        return [batch.images, batch.word_ids, batch.padding, *batch.single, *batch.joint]
