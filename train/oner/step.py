"""The gradient of a step of OneR: all passes and objectives, exact under micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from oner_fast.data.batch import PairBatch
from oner_fast.data.word_masks import Vocabulary
from oner_fast.models.oner import OneR, Pass, PassName
from oner_fast.ops.collectives import ranks_alike
from oner_fast.train.engine.distributed import World, sum_over_ranks
from oner_fast.train.engine.repeated_captions import repeated_share
from oner_fast.train.engine.replica import Replica
from oner_fast.train.engine.two_pass import first_pass, second_pass
from oner_fast.train.oner.custom_objectives import load_objectives
from oner_fast.train.oner.inputs import StepInput, StepInputs, StudentInput
from oner_fast.train.oner.objectives import contrastive_losses
from oner_fast.train.oner.settings import OneRConfiguration
from oner_fast.train.oner.student import Student, StudentOutput


@dataclass(frozen=True)
class StepResult:
    """The loss of a step.

    Attributes:
        loss: 0-d, over all ranks.
        parts: its component losses by name, unweighted; 0-d, over all ranks.
        repeated_captions: 0-d, the share of the pairs of all ranks whose caption another pair has.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    repeated_captions: Tensor


class _MaskedSums(NamedTuple):
    """This rank's shares of the masked losses and their weighted sum (all 0-d)."""

    mlm: Tensor
    mim: Tensor
    weighted: Tensor


class TrainingStep:
    """`step(batch)` leaves the gradient of the whole batch in the student's parameters.

    With `accum_freq` > 1 the contrast still sees all pairs, by two-pass accumulation
    (`oner_fast.train.engine.two_pass`). Masks are part of the input, so both passes are the same computation.

    A batch brings its inputs from the loader's workers. Where it does not, they are made here by `prepare`.
    """

    def __init__(
        self,
        config: OneRConfiguration,
        student: Student,
        teacher: OneR | None,
        vocabulary: Vocabulary,
        world: World,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.config, self.teacher, self.world = config, teacher, world
        self.prepare = StepInputs(config, vocabulary)
        self.custom = load_objectives(config.objectives.custom)
        self.replica = Replica(student, world, autocast_dtype)

    def __call__(self, batch: PairBatch) -> StepResult:
        c = self.config
        if batch.inputs is None:
            batch = replace(batch, inputs=self.prepare(batch))
        batch = batch.to(self.world.device, non_blocking=True)
        given: StepInput = batch.inputs
        words, patches = sum_over_ranks(given.counts).clamp(min=1).unbind()
        inputs, ids = given.student, batch.caption_ids
        keys = self._keys(given.teacher)
        if len(inputs) == 1:
            output: StudentOutput = self.replica(inputs[0])
            losses, contrast = self._contrast(output.embeddings, keys, output.logit_scale, ids)
            sums = self._masked(output, words, patches)
            (contrast + sums.weighted * self.world.size).backward()
        else:
            losses, contrast, sums = self._accumulate(inputs, keys, ids, words, patches)
        totals = sum_over_ranks(torch.stack([sums.mlm, sums.mim])).unbind()
        masked_parts = {"mlm": totals[0], "mim": totals[1]}
        weights = {"mlm": c.objectives.mlm, "mim": c.objectives.mim}
        losses |= {name: value for name, value in masked_parts.items() if weights[name]}
        loss = contrast.detach() + sum(weights[name] * value for name, value in masked_parts.items())
        for each in self.custom:
            own = losses[each.name].detach()
            losses[each.name] = sum_over_ranks(own) / self.world.size
            loss = loss + each.weight * (losses[each.name] - own)
        detached = {name: value.detach() for name, value in losses.items()}
        return StepResult(loss, detached, repeated_share(ids))

    def _accumulate(
        self, inputs: Sequence[StudentInput], keys: dict[PassName, Tensor], ids: Tensor, words: Tensor, patches: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, _MaskedSums]:
        leaves = first_pass(self.replica, self.replica, inputs)
        losses, contrast = self._contrast(leaves.embeddings, keys, leaves.logit_scale, ids)
        if contrast.requires_grad:
            contrast.backward()
        zero = torch.zeros((), device=self.world.device)
        total = _MaskedSums(zero, zero, zero)

        def masked_loss(output: StudentOutput) -> Tensor:
            nonlocal total
            sums = self._masked(output, words, patches)
            total = _MaskedSums(*(a + b.detach() for a, b in zip(total, sums, strict=True)))
            return sums.weighted * self.world.size

        second_pass(self.replica, self.replica, inputs, leaves, masked_loss)
        return losses, contrast, total

    def _keys(self, parts: Sequence[tuple[Pass, ...]]) -> dict[PassName, Tensor]:
        """Embed the whole local batch with the teacher; empty where the student gives the keys."""
        if self.teacher is None or not self.config.objectives.contrastive:
            return {}
        found: dict[PassName, list[Tensor]] = {"image": [], "text": []}
        with torch.no_grad(), self.replica.autocast():
            for part in parts:
                for name, projected in self.teacher.project_cls(self.teacher(part, {})).items():
                    found[name].append(projected)
        return {name: torch.cat(each) for name, each in found.items()}

    def _contrast(
        self, query: Mapping[PassName, Tensor], keys: Mapping[PassName, Tensor], scale: Tensor, ids: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        objectives = self.config.objectives
        if not objectives.contrastive:
            return {}, torch.zeros((), device=self.world.device)
        keys = keys or query
        with ranks_alike():
            losses = contrastive_losses(query, keys, scale, objectives, self.replica.group, ids)
        factor = 2 * objectives.temperature if objectives.temperature_factor else 1.0
        weights = {name: factor * getattr(objectives, name) for name in losses}
        for each in self.custom:
            with ranks_alike():
                losses[each.name] = each(query, keys, scale, self.replica.group)
            weights[each.name] = each.weight
        return losses, torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()

    def _masked(self, output: StudentOutput, words: Tensor, patches: Tensor) -> _MaskedSums:
        """Divide the sums of this rank's masked positions by the count of all ranks and micro-batches."""
        mlm, mim = output.mlm_sum / words, output.mim_sum / patches
        return _MaskedSums(mlm, mim, self.config.objectives.mlm * mlm + self.config.objectives.mim * mim)
