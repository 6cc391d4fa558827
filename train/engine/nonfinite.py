"""Steps whose loss or gradient is not finite are skipped on every rank and counted; too many end the run.

The device decides: the optimiser and the teacher's average take the decision as a tensor, and a bad step leaves them as
they are. The host reads the decision afterwards, for its counts. On a GPU it reads that of the step before, so that it
need not wait for the step that it has just started. On the CPU the decision is there at once, and is read at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oner_fast.train.engine.distributed import sum_over_ranks
from oner_fast.train.engine.late_numbers import LateNumbers


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class NonFiniteGuard:
    """Decides for each step whether it counts, and counts those that do not.

    Attributes:
        limit: number of steps skipped in a row that raises `NonFiniteError`.
        skipped: steps skipped in the whole run, as far as `settle` has read.
        consecutive: steps skipped since the last good one, likewise.

    Args:
        limit: at least 1.
        late: carries the decisions to the host.
    """

    def __init__(self, limit: int = 20, late: LateNumbers | None = None) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.limit = limit
        self.skipped = 0
        self.consecutive = 0
        self._late = late or LateNumbers()

    def vote(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Decide on the device whether to skip the step: loss or gradient norm is not finite on some rank.

        Does not wait for the device. Every rank must call it; all get the same answer.

        Args:
            loss: 0-d, floating point.
            grad_norm: 0-d, on the same device, before clipping.

        Returns:
            1.0 to skip the step, else 0.0: 0-d float32, as `found_inf` of PyTorch's fused optimisers takes it.
        """
        given = torch.stack([loss.detach().double(), grad_norm.detach().double()])
        bad = sum_over_ranks((~torch.isfinite(given)).double())
        self._late.put(torch.cat([bad, given]))
        return (bad.sum() > 0).float()

    def settle(self, everything: bool = False) -> None:
        """Count the decisions that have come: on the CPU all, on a GPU all but the last.

        Args:
            everything: wait for the last one too, as before a checkpoint. Every rank must do so at the same step.

        Raises:
            NonFiniteError: one of them was the `limit`-th skipped step in a row.
        """
        for bad_losses, bad_norms, loss, grad_norm in self._late.take(everything):
            if not bad_losses and not bad_norms:
                self.consecutive = 0
                continue
            self.skipped += 1
            self.consecutive += 1
            if self.consecutive >= self.limit:
                raise NonFiniteError(
                    f"{self.consecutive} steps in a row had no finite loss or gradient (the last: loss {loss}, "
                    f"gradient norm {grad_norm} on this rank; loss bad on {bad_losses:.0f} ranks, gradient on "
                    f"{bad_norms:.0f}). Lower the learning rate, lengthen the warm-up, or train in fp32"
                )

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a checkpoint; call `settle(everything=True)` first."""
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the counts of `state_dict`."""
        self.skipped, self.consecutive = int(state["skipped"]), int(state["consecutive"])
