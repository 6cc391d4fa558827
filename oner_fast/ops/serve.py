"""Take the function that serves a call: the chosen implementation or, where there are no values, that of shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from oner_fast.ops.implementations import Facts, choose, forced, implementations
from oner_fast.ops.values import is_fake


def serve(
    facts: Facts, implementation: str | None, first: Tensor, shapes: Callable[..., Any], reading: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Choose the implementation of a call.

    Args:
        facts: the op, the device type and what implementations ask about.
        implementation: the name that the caller forces, if any.
        first: the call's first tensor.
        shapes: an implementation by raw ops, whose fake implementations give the shapes of results and gradients. It
            serves tensors on the meta device.
        reading: the names of implementations that read values on the host. `shapes` serves in their place where the
            tensors are fake.

    Raises:
        ValueError: the op or the forced name is unknown.
        RuntimeError: the forced implementation cannot run, or none can.
    """
    op, device, known = facts
    if device == "meta":
        wanted = forced(op, implementation)
        if wanted is None or wanted[0] in implementations(op):
            return shapes
    chosen = choose(op, device, implementation, **known)
    return shapes if chosen.name in reading and is_fake(first) else chosen.function
