"""User-defined objectives: functions of the embeddings, from a Python file or an installed package."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from oner_fast.models.oner import PassName
from oner_fast.train.config.python_file import import_file, split_reference
from oner_fast.train.oner.settings import CustomObjective

GROUP = "oner_fast.objectives"


class Objective(Protocol):
    """A loss of the embeddings of the batch."""

    def __call__(
        self,
        query: Mapping[PassName, Tensor],
        key: Mapping[PassName, Tensor],
        logit_scale: Tensor,
        *,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            query: the student's embeddings (N, E) of each of its passes, with gradient, not normalised. N is this
                rank's part of the batch, all micro-batches together.
            key: the teacher's embeddings (N, E) of `image` and `text`, without gradient; the student's own where there
                is no teacher.
            logit_scale: 1 / temperature, 0-d.
            group: the ranks whose batches together are the batch of the step; None for a single process.

        Returns:
            A 0-d floating-point loss. The step's loss is its mean over the ranks.
        """


@dataclass(frozen=True)
class LoadedObjective:
    """A user-defined objective, ready to be called.

    Attributes:
        name: the name of its loss in the metrics.
        weight: its share in the step's loss.
        function: the objective.
        source: its name in the configuration, for messages.
    """

    name: str
    weight: float
    function: Objective
    source: str

    def __call__(
        self,
        query: Mapping[PassName, Tensor],
        key: Mapping[PassName, Tensor],
        logit_scale: Tensor,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Compute the loss (0-d).

        Raises:
            ValueError: the function returned something else.
        """
        loss = self.function(query, key, logit_scale, group=group)
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            got = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"objective {self.source!r} must return a 0-d floating-point tensor, got {got}")
        return loss


def load_objectives(custom: Sequence[CustomObjective]) -> list[LoadedObjective]:
    """Load the objectives of a configuration: `FILE.py:FUNCTION`, or the name of an entry point.

    Raises:
        ValueError: there is no such file, function or entry point, or the file fails.
    """
    return [_load(each) for each in custom]


def _load(custom: CustomObjective) -> LoadedObjective:
    reference = split_reference(custom.source)
    if reference is not None:
        path, name = reference
        try:
            function = getattr(import_file(path), name, None)
        except ValueError as error:
            raise ValueError(f"objective {custom.source!r}: {error}") from error
        if not callable(function):
            raise ValueError(f"objective {custom.source!r}: {path} has no function {name!r}; give FILE.py:FUNCTION")
        return LoadedObjective(custom.name, custom.weight, function, custom.source)
    points = importlib.metadata.entry_points(group=GROUP)
    if custom.source not in points.names:
        known = ", ".join(sorted(points.names)) or "none"
        raise ValueError(
            f"objective {custom.source!r} is no FILE.py:FUNCTION and no entry point of {GROUP!r}; installed: {known}"
        )
    return LoadedObjective(custom.name, custom.weight, points[custom.source].load(), custom.source)
