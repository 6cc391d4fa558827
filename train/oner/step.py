"""One optimisation step's gradient: all passes, all objectives, exact under micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from oner_fast.data.batch import PairBatch
from oner_fast.data.masking import Vocabulary
from oner_fast.models.oner import OneR, PassName
from oner_fast.train.engine.distributed import World, sum_over_ranks
from oner_fast.train.oner.inputs import StudentInput, student_input, teacher_input
from oner_fast.train.oner.objectives import contrastive_losses, modality_gap
from oner_fast.train.oner.settings import OneRTraining
from oner_fast.train.oner.student import Student, StudentOutput


@dataclass(frozen=True)
class StepResult:
    """loss and its parts by name (0-d, over all ranks, unweighted parts), and the modality gap of all ranks' keys
    (0-d)."""

    loss: Tensor
    parts: dict[str, Tensor]
    modality_gap: Tensor | None


class _MaskedSums(NamedTuple):
    """This rank's shares of the masked losses (0-d), and their weighted sum."""

    mlm: Tensor
    mim: Tensor
    weighted: Tensor


class TrainingStep:
    """``step(batch)`` leaves the gradient of the whole batch in the student's parameters.

    With ``accum_freq`` > 1 the contrast still sees all pairs: a first forward of every micro-batch without a graph
    gives the embeddings, the loss of all of them gives their gradients, and a second forward of each carries these
    back. Masks are part of the input, so both forwards are the same computation.
    """

    def __init__(
        self,
        config: OneRTraining,
        student: Student,
        teacher: OneR | None,
        vocabulary: Vocabulary,
        world: World,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.config, self.teacher, self.vocabulary, self.world = config, teacher, vocabulary, world
        self.autocast_dtype = autocast_dtype
        self.module: nn.Module = student
        self.group: dist.ProcessGroup | None = None
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.module = DistributedDataParallel(student, device_ids=devices, gradient_as_bucket_view=True)
            self.group = dist.group.WORLD

    def __call__(self, batch: PairBatch) -> StepResult:
        c, device = self.config, self.world.device
        parts = batch.split(c.optim.accum_freq)
        masked = [student_input(part, c.objectives, c.model, c.run.seed, self.vocabulary) for part in parts]
        counts = torch.tensor([sum(m.word_count for m in masked), sum(m.patch_count for m in masked)], device=device)
        words, patches = sum_over_ranks(counts).clamp(min=1).unbind()
        inputs = [each.to(device) for each in masked]
        keys = self._keys([part.to(device) for part in parts])
        if len(inputs) == 1:
            output = self._forward(inputs[0])
            losses, contrast = self._contrast(output.embeddings, keys, output.logit_scale)
            sums = self._masked(output, words, patches)
            (contrast + sums.weighted * self.world.size).backward()
            embeddings = output.embeddings
        else:
            embeddings, losses, contrast, sums = self._accumulate(inputs, keys, words, patches)
        totals = sum_over_ranks(torch.stack([sums.mlm, sums.mim])).unbind()
        masked_parts = {"mlm": totals[0], "mim": totals[1]}
        weights = {"mlm": c.objectives.mlm, "mim": c.objectives.mim}
        losses |= {name: value for name, value in masked_parts.items() if weights[name]}
        loss = contrast.detach() + sum(weights[name] * value for name, value in masked_parts.items())
        shown = keys or embeddings
        gap = modality_gap(shown["image"], shown["text"]) if c.objectives.contrastive else None
        return StepResult(loss, {name: value.detach() for name, value in losses.items()}, gap)

    def _accumulate(
        self, inputs: list[StudentInput], keys: dict[PassName, Tensor], words: Tensor, patches: Tensor
    ) -> tuple[dict[PassName, Tensor], dict[str, Tensor], Tensor, _MaskedSums]:
        with torch.no_grad(), self._without_sync():
            first = [self._forward(each) for each in inputs]
        names = list(first[0].embeddings)
        leaves = {name: torch.cat([each.embeddings[name] for each in first]).requires_grad_() for name in names}
        scale = first[0].logit_scale.clone().requires_grad_()
        losses, contrast = self._contrast(leaves, keys, scale)
        if contrast.requires_grad:
            contrast.backward()
        zero = torch.zeros((), device=self.world.device)
        total = _MaskedSums(zero, zero, zero)
        start = 0
        for index, each in enumerate(inputs):
            last = index == len(inputs) - 1
            with nullcontext() if last else self._without_sync():
                output = self._forward(each)
                sums = self._masked(output, words, patches)
                surrogate = sums.weighted * self.world.size
                for name in names:
                    rows = output.embeddings[name].shape[0]
                    gradient = leaves[name].grad
                    if gradient is not None:
                        surrogate = surrogate + (output.embeddings[name] * gradient[start : start + rows]).sum()
                if scale.grad is not None:
                    surrogate = surrogate + output.logit_scale * scale.grad / len(inputs)
                surrogate.backward()
            start += rows if names else 0
            total = _MaskedSums(*(a + b.detach() for a, b in zip(total, sums, strict=True)))
        return {name: leaf.detach() for name, leaf in leaves.items()}, losses, contrast, total

    def _forward(self, inputs: StudentInput) -> StudentOutput:
        with self._autocast():
            return self.module(inputs)

    def _keys(self, parts: list[PairBatch]) -> dict[PassName, Tensor]:
        """The teacher's embeddings of the whole local batch; empty where the student gives the keys."""
        if self.teacher is None or not self.config.objectives.contrastive:
            return {}
        found: dict[PassName, list[Tensor]] = {"image": [], "text": []}
        with torch.no_grad(), self._autocast():
            for part in parts:
                for name, projected in self.teacher.project_cls(self.teacher(teacher_input(part), {})).items():
                    found[name].append(projected)
        return {name: torch.cat(each) for name, each in found.items()}

    def _contrast(
        self, query: Mapping[PassName, Tensor], keys: Mapping[PassName, Tensor], scale: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        objectives = self.config.objectives
        if not objectives.contrastive:
            return {}, torch.zeros((), device=self.world.device)
        losses = contrastive_losses(query, keys or query, scale, objectives, self.group)
        weighted = [getattr(objectives, name) * loss for name, loss in losses.items()]
        return losses, torch.stack(weighted).sum()

    def _masked(self, output: StudentOutput, words: Tensor, patches: Tensor) -> _MaskedSums:
        """Sums over this rank's masked positions, over the count of all ranks and micro-batches."""
        mlm, mim = output.mlm_sum / words, output.mim_sum / patches
        return _MaskedSums(mlm, mim, self.config.objectives.mlm * mlm + self.config.objectives.mim * mim)

    def _autocast(self) -> AbstractContextManager[object]:
        device = self.world.device.type
        return torch.autocast(device, dtype=self.autocast_dtype) if self.autocast_dtype else nullcontext()

    def _without_sync(self) -> AbstractContextManager[object]:
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()
