"""Numbers that a device computes in a step and that the host reads a step later, so that it waits for no step's end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor


class Arrival(Protocol):
    """The end of a copy, such as a CUDA event."""

    def synchronize(self) -> None:
        """Wait for it."""


ToHost = Callable[[Tensor], tuple[Tensor, Arrival | None]]
"""Start a copy to the host; return the copy and its arrival, or None where it is there already."""


class LateNumbers:
    """A queue of numbers on their way to the host.

    On a GPU the newest ones stay in the queue, and the host waits for those before them: the GPU still has all the work
    of the newest step. On the CPU nothing is on its way: all numbers are read at once, by the same calls.

    Args:
        to_host: starts a copy; a test that has no GPU gives its own.
    """

    def __init__(self, to_host: ToHost | None = None) -> None:
        self._to_host = to_host or copy_to_host
        self._pending: deque[tuple[Tensor, Arrival | None]] = deque()

    def put(self, numbers: Tensor) -> None:
        """Start to copy numbers (n,) to the host. Does not wait."""
        self._pending.append(self._to_host(numbers))

    def take(self, everything: bool = False) -> Iterator[list[float]]:
        """Yield the numbers of earlier calls of `put`, oldest first; those of the last one only if they are there.

        `everything` waits for the last ones too.
        """
        while self._pending:
            numbers, arrival = self._pending[0]
            if arrival is not None:
                if len(self._pending) == 1 and not everything:
                    return
                arrival.synchronize()
            self._pending.popleft()
            yield numbers.tolist()


def copy_to_host(numbers: Tensor) -> tuple[Tensor, Arrival | None]:
    """Start to copy numbers of a GPU into page-locked memory; numbers on the CPU are there already."""
    if numbers.device.type != "cuda":
        return numbers, None
    there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    there.copy_(numbers, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record()
    return there, arrival
