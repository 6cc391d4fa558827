"""The gradient of a step of UTA: the student's tokens aligned to the frozen teacher's (UTA)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from oner_fast import ops
from oner_fast.data.batch import PairBatch
from oner_fast.models.uta import UTA
from oner_fast.train.engine.distributed import World, sum_over_ranks
from oner_fast.train.engine.replica import Replica
from oner_fast.train.uta.inputs import AlignmentInput, AlignmentInputs
from oner_fast.train.uta.settings import UTAConfiguration
from oner_fast.train.uta.teacher_features import TeacherFeatures


class AlignmentStep:
    """`step(batch)` leaves the gradient of the whole batch in the student's parameters and returns the loss (0-d).

    Every sample has the same number of tokens, so the mean over micro-batches and ranks is the mean over the batch.

    A batch brings its inputs from the loader's workers. Where it does not, they are made here by `prepare`.
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
        self.prepare = AlignmentInputs(config)
        self.replica = Replica(student, world, autocast_dtype)

    def __call__(self, batch: PairBatch) -> Tensor:
        if batch.inputs is None:
            batch = replace(batch, inputs=self.prepare(batch))
        moved, tokens = self.features.take(batch)
        parts: tuple[AlignmentInput, ...] = moved.inputs
        if batch.step == 0 and self.config.alignment.head_init == "teacher_mean":
            turn_head_to(self.student, tokens, self.world)
        targets = tokens.chunk(len(parts))
        total = torch.zeros((), device=self.world.device)
        for index, (part, target) in enumerate(zip(parts, targets, strict=True)):
            with self.replica.synced_at(index, len(parts)):
                loss = self.loss(part, target) / len(parts)
                loss.backward()
            total += loss.detach()
        return sum_over_ranks(total) / self.world.size

    def loss(self, part: AlignmentInput, target: Tensor) -> Tensor:
        """Return the mean of -cosine (0-d) over the tokens of a micro-batch.

        Args:
            part: the micro-batch.
            target: the teacher's tokens (B, 1 + N, E), [CLS] first.
        """
        if part.masked is None:
            return ops.token_alignment(
                self.replica(part.images, part.kept, branch_factors=part.factors), target, part.rows
            )
        assert part.rows is not None
        tokens = self.replica(
            part.images, masked=part.masked, masked_count=part.masked_count, branch_factors=part.factors
        )
        return ops.token_alignment(ops.masked_gather(tokens, part.rows), target, part.rows)


@torch.no_grad()
def turn_head_to(student: UTA, tokens: Tensor, world: World) -> None:
    """Set the bias of the head to the mean direction of the teacher's tokens (B, T, E), over all ranks.

    A bias that is not 0 belongs to weights that the run began with, and stays. The length of the bias is that of the
    rest of an output at the start: each of the E outputs is a sum over normalised numbers with weights of the head, so
    that the expected square of their length is that of the weights.
    """
    mean = torch.nn.functional.normalize(tokens.float(), dim=-1).mean(dim=(0, 1))
    mean = sum_over_ranks(mean) / world.size
    head = student.head
    turned = torch.nn.functional.normalize(mean, dim=0) * head.weight.float().norm()
    head.bias.copy_(torch.where(head.bias.any(), head.bias, turned))
