"""The gradient of a step of UTA: the student's tokens aligned to the frozen teacher's (UTA)."""

from __future__ import annotations

import torch
from torch import Tensor

from oner_fast import ops
from oner_fast.data.batch import PairBatch
from oner_fast.models.uta import UTA
from oner_fast.nn.drop_path import branch_factors
from oner_fast.ops.patch_masks import draw_masks
from oner_fast.train.engine.distributed import World, sum_over_ranks
from oner_fast.train.engine.replica import Replica
from oner_fast.train.uta.settings import UTAConfiguration
from oner_fast.train.uta.teacher_features import TeacherFeatures

_STREAM = 0  # the stream of the masks' random numbers


class AlignmentStep:
    """`step(batch)` leaves the gradient of the whole batch in the student's parameters and returns the loss (0-d).

    Every sample has the same number of tokens, so the mean over micro-batches and ranks is the mean over the batch.
    """

    def __init__(
        self,
        config: UTAConfiguration,
        student: UTA,
        features: TeacherFeatures,
        world: World,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.config, self.student, self.features, self.world = config, student, features, world
        self.replica = Replica(student, world, autocast_dtype)

    def __call__(self, batch: PairBatch) -> Tensor:
        count = self.config.optim.accum_freq
        parts = [part.to(self.world.device, non_blocking=True) for part in batch.split(count)]
        tokens = self.features.take(batch)
        # A bias that is not 0 belongs to weights that the run began with.
        new = batch.step == 0 and self.config.alignment.head_init == "teacher_mean"
        if new and not self.student.head.bias.any():
            turn_head_to(self.student, tokens, self.world)
        targets = tokens.chunk(count)
        total = torch.zeros((), device=self.world.device)
        for index, (part, target) in enumerate(zip(parts, targets, strict=True)):
            with self.replica.synced_at(index, count):
                loss = self.loss(part, target) / count
                loss.backward()
            total += loss.detach()
        return sum_over_ranks(total) / self.world.size

    def loss(self, batch: PairBatch, target: Tensor) -> Tensor:
        """Return the mean of -cosine (0-d) over the tokens of a micro-batch.

        Args:
            batch: the micro-batch.
            target: the teacher's tokens (B, 1 + N, E), [CLS] first.
        """
        alignment, model = self.config.alignment, self.config.model
        hidden = alignment.hidden(model.cells)
        factors = None
        if alignment.drop_path:
            factors = branch_factors(alignment.drop_path, model.depth, self.config.run.seed, batch.step, batch.samples)
        if alignment.objective == "distillation":
            return ops.token_alignment(self.replica(batch.images, branch_factors=factors), target)
        masks = draw_masks(
            self.config.run.seed,
            batch.step,
            batch.samples,
            (model.grid, model.grid),
            hidden,
            alignment.mask,
            _STREAM,
        )
        if alignment.objective == "uta":
            return ops.token_alignment(
                self.replica(batch.images, masks.kept, branch_factors=factors), target, with_cls(masks.kept)
            )
        rows = with_cls(masks.mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :hidden])
        tokens = self.replica(batch.images, masked=masks.mask, branch_factors=factors)
        return ops.token_alignment(ops.masked_gather(tokens, rows), target, rows)


@torch.no_grad()
def turn_head_to(student: UTA, tokens: Tensor, world: World) -> None:
    """Set the bias of the head to the mean direction of the teacher's tokens (B, T, E), over all ranks.

    Its length is that of the rest of an output at the start: each of the E outputs is a sum over normalised numbers
    with weights of the head, so that the expected square of their length is that of the weights.
    """
    mean = torch.nn.functional.normalize(tokens.float(), dim=-1).mean(dim=(0, 1))
    mean = sum_over_ranks(mean) / world.size
    length = student.head.weight.float().norm()
    student.head.bias.copy_(torch.nn.functional.normalize(mean, dim=0) * length)


def with_cls(cells: Tensor) -> Tensor:
    """Turn patch indices (B, K) into token indices (B, 1 + K) of a sequence that begins with [CLS]."""
    return torch.nn.functional.pad(cells + 1, (1, 0))
