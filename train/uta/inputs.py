"""The inputs of a step of UTA: masks and stochastic depth, drawn where the batch is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oner_fast.data.batch import PairBatch
from oner_fast.nn.drop_path import branch_factors
from oner_fast.ops.patch_masks import draw_masks
from oner_fast.train.uta.settings import UTAConfiguration

_STREAM = 0  # the stream of the masks' random numbers


@dataclass(frozen=True)
class AlignmentInput:
    """A micro-batch as the student sees it.

    Attributes:
        images: (B, 3, S, S) uint8.
        kept: (B, K) int64, the cells that enter; all where None.
        masked: (B, N) bool, the cells that enter as the mask token; none where None.
        masked_count: how many those are in each image.
        rows: (B, R) int64, the teacher's tokens that are targets; all where None.
        factors: (2 * depth, B), the factors of each image's residual branches; none where None.
    """

    images: Tensor
    kept: Tensor | None = None
    masked: Tensor | None = None
    masked_count: int | None = None
    rows: Tensor | None = None
    factors: Tensor | None = None


@dataclass(frozen=True)
class AlignmentInputs:
    """Make the inputs of a batch, one for each micro-batch, on the CPU: a step then draws nothing.

    Every draw is keyed by (seed, step, place in the global batch), so that it makes no difference where it is drawn.
    """

    config: UTAConfiguration

    def __call__(self, batch: PairBatch) -> tuple[AlignmentInput, ...]:
        """Split the batch into micro-batches and mask them."""
        return tuple(self._part(part) for part in batch.split(self.config.optim.accum_freq))

    def _part(self, batch: PairBatch) -> AlignmentInput:
        alignment, model, seed = self.config.alignment, self.config.model, self.config.run.seed
        hidden = alignment.hidden(model.cells)
        factors = None
        if alignment.drop_path:
            factors = branch_factors(alignment.drop_path, model.depth, seed, batch.step, batch.samples)
        if alignment.objective == "distillation":
            return AlignmentInput(batch.images, factors=factors)
        grid = (model.grid, model.grid)
        masks = draw_masks(seed, batch.step, batch.samples, grid, hidden, alignment.mask, _STREAM)
        if alignment.objective == "uta":
            return AlignmentInput(batch.images, masks.kept, rows=with_cls(masks.kept), factors=factors)
        rows = with_cls(masks.mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :hidden])
        return AlignmentInput(batch.images, masked=masks.mask, masked_count=hidden, rows=rows, factors=factors)


def with_cls(cells: Tensor) -> Tensor:
    """Turn patch indices (B, K) into token indices (B, 1 + K) of a sequence that begins with [CLS]."""
    return torch.nn.functional.pad(cells + 1, (1, 0))
