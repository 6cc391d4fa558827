"""One rank's copy of the trained module: gradients averaged over ranks, and matrix products in the run's dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from oner_fast.train.engine.distributed import World


class Replica:
    """A module that is called under autocast and, with several ranks, averages its gradients in the backward pass.

    Args:
        module: the trained module, on the device of `world`.
        world: this process among its peers.
        autocast_dtype: dtype of matrix products; None leaves them in the parameters' dtype.

    Attributes:
        group: the ranks whose batches together are the batch of the step; None for a single process.
    """

    def __init__(self, module: nn.Module, world: World, autocast_dtype: torch.dtype | None) -> None:
        self.world, self.autocast_dtype = world, autocast_dtype
        self.module = module
        self.group: dist.ProcessGroup | None = None
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.module = DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
            self.group = dist.group.WORLD

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module under autocast."""
        with self.autocast():
            return self.module(*args, **kwargs)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which matrix products have the run's dtype.

        A weight of two products is cast for each. With autocast's cache both would share one copy, and their gradients
        would be added in the copy's dtype.
        """
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self.autocast_dtype, cache_enabled=False)

    def without_sync(self) -> AbstractContextManager[object]:
        """Return the context in which backward passes only add to this rank's gradients."""
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()

    def synced_at(self, index: int, count: int) -> AbstractContextManager[object]:
        """Return the context of one micro-batch of several: only the last one's backward averages gradients."""
        return nullcontext() if index == count - 1 else self.without_sync()
