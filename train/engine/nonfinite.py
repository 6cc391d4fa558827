"""Steps whose loss or gradient is not finite are skipped on every rank and counted; too many end the run."""

from __future__ import annotations

from typing import Any

import torch

from oner_fast.train.engine.distributed import sum_over_ranks


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class NonFiniteGuard:
    """Decides for each step whether the optimiser may run.

    Attributes:
        limit: number of steps skipped in a row that raises `NonFiniteError`.
        skipped: steps skipped in the whole run.
        consecutive: steps skipped since the last good one.
    """

    def __init__(self, limit: int = 20) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.limit = limit
        self.skipped = 0
        self.consecutive = 0

    def check(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> bool:
        """Tell whether to take the step: loss and gradient norm are finite on every rank.

        Waits for the device once. Every rank must call it; all get the same answer.

        Args:
            loss: of any shape, floating point.
            grad_norm: of any shape, on the same device, before clipping.

        Raises:
            NonFiniteError: this is the `limit`-th skipped step in a row.
        """
        good_loss = torch.isfinite(loss.detach()).all()
        good_norm = torch.isfinite(grad_norm.detach()).all()
        bad = sum_over_ranks(torch.stack([~good_loss, ~good_norm]).to(torch.int32)).tolist()
        if not any(bad):
            self.consecutive = 0
            return True
        self.skipped += 1
        self.consecutive += 1
        if self.consecutive >= self.limit:
            raise NonFiniteError(
                f"{self.consecutive} steps in a row had no finite loss or gradient (the last: loss {loss.tolist()}, "
                f"gradient norm {grad_norm.tolist()} on this rank; loss bad on {bad[0]} ranks, gradient on {bad[1]}). "
                "Lower the learning rate, lengthen the warm-up, or train in fp32"
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the counts of `state_dict`."""
        self.skipped, self.consecutive = int(state["skipped"]), int(state["consecutive"])
