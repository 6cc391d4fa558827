"""Define the measurements.

A case is one op at one shape and dtype, a contender is one way to compute it, and a target is a promise about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from oner_fast.ops.implementations import Facts

OURS = "oner_fast"
EVERYTHING = ("precision", "time", "memory")
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """Arguments of one call, in the layout that suits a contender best.

    Args:
        arguments: the arguments of the forward.
        leaves: the arguments that take a gradient; without any the call is a forward alone.
        upstream: the gradient of the output, or one for each of several outputs.
    """

    arguments: tuple[Any, ...]
    leaves: tuple[Tensor, ...] = ()
    upstream: tuple[Tensor, ...] = ()

    def bytes(self) -> int:
        """Bytes of all tensors, each storage counted once."""
        tensors = [one for one in (*self.arguments, *self.upstream) if isinstance(one, Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


Result = tuple[Tensor, ...]
Layout = Callable[[Call], Call]


def as_given(call: Call) -> Call:
    """Keep the case's own layout."""
    return call


def _unchanged(results: Result) -> Result:
    return results


@dataclass(frozen=True)
class Contender:
    """One way to compute the op.

    Args:
        name: unique in a case; "oner_fast" is ours.
        forward: called with the arguments of the laid-out call; returns a tensor or a tuple of tensors.
        layout: converts the case's call to the layout that suits this contender best; not timed.
        restore: converts (outputs..., gradients...) back to the case's layout, for the comparison with float64.
        compiled: whether torch.compile compiles the forward, as one graph and for static shapes.
        quick: whether a quick run includes it. A contender known to be slower than a similar one is left out.
        devices: devices on which it is run.
    """

    name: str
    forward: Forward
    layout: Layout = as_given
    restore: Callable[[Result], Result] = _unchanged
    compiled: bool = False
    quick: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")

    def function(self) -> Forward:
        """The forward that is timed."""
        return torch.compile(self.forward, fullgraph=True, dynamic=False) if self.compiled else self.forward

    @property
    def ours(self) -> bool:
        """Whether this is ours, or one of our implementations by name, and so not a baseline."""
        return self.name.split()[0] == OURS

    @property
    def eager(self) -> bool:
        """Whether this is a baseline without torch.compile."""
        return not self.compiled and not self.ours


@dataclass(frozen=True)
class Target:
    """Promises of an op at this shape; None where there is no promise.

    Args:
        speedup: at least this many times faster than the fastest baseline.
        eager: at least this many times faster than the fastest eager baseline.
        share: at least this share of the machine's limit.
        memory_share: at most this share of the peak memory of the fastest compiled baseline.
        memory_bytes: at most this peak memory.
    """

    speedup: float | None = None
    eager: float | None = None
    share: float | None = None
    memory_share: float | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype.

    Args:
        op: its name in `oner_fast.ops`.
        shape: a description for readers, and part of the key.
        dtype: dtype of the floating inputs (of the result where the inputs are bytes).
        make: makes the call of a seed on a device, in the case's layout.
        contenders: ours first.
        exact: computes (outputs..., gradients...) of a call in float64.
        flops: FLOPs that the op must compute, forward and backward, within its memory contract.
        bytes: bytes that it must read and write, forward and backward.
        limit: the machine's limit that bounds the op: "gemm" or "copy".
        limit_dtype: dtype of the products that bound it; `dtype` where None.
        target: our promises.
        measured: what is measured; `EVERYTHING`, or memory alone where the baselines would not fit, or precision alone.
        counted: FLOPs that PyTorch's counter must find in eager code; None where no counted operation is used.
        saved: bytes that ours keeps for backward beyond its inputs.
        facts: takes the call's arguments and returns its facts (see `oner_fast.ops.implementations`); None: the dtype
            alone.
        notes: remarks that a reader of the row needs.
        served: what serves ours, for a layer that is no op; then there is no implementation to choose.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[int, str], Call]
    contenders: Sequence[Contender]
    exact: Callable[[Call], Result]
    flops: float
    bytes: float
    limit: str
    target: Target = Target()
    limit_dtype: torch.dtype | None = None
    measured: tuple[str, ...] = EVERYTHING
    counted: float | None = None
    saved: int = 0
    facts: Callable[..., Facts] | None = None
    notes: tuple[str, ...] = field(default=())
    served: str = ""

    @property
    def key(self) -> str:
        """Unique name among all cases."""
        return key_of(self.op, self.shape, name_of(self.dtype))

    @property
    def timed(self) -> bool:
        """Whether the case is timed."""
        return "time" in self.measured

    def contender(self, name: str) -> Contender:
        """Find a contender by its name; ValueError lists the known names."""
        for one in self.contenders:
            if one.name == name:
                return one
        known = ", ".join(one.name for one in self.contenders)
        raise ValueError(f"{self.key} has no contender {name!r}; known: {known}")

    def facts_of(self, call: Call, device: str) -> Facts:
        """Return the facts by which the op chooses the implementation of our `call`, laid out as ours takes it."""
        return (self.op, device, {"dtype": self.dtype}) if self.facts is None else self.facts(*call.arguments)


def key_of(op: str, shape: str, dtype: str) -> str:
    """Name of a measurement, by which the records of commits are compared."""
    return f"{op} {shape} {dtype}"


def name_of(dtype: torch.dtype) -> str:
    """Name of a dtype without its module, such as float32."""
    return str(dtype).removeprefix("torch.")


def step(forward: Forward, call: Call) -> Result:
    """Run the forward and, where the call has leaves, the backward: (outputs..., gradients...)."""
    outputs = forward(*call.arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not call.leaves:
        return outputs
    return (*outputs, *torch.autograd.grad(outputs, call.leaves, call.upstream))


def exact_by(definition: Forward) -> Callable[[Call], Result]:
    """Compute a call in float64 with a reference implementation."""

    def compute(call: Call) -> Result:
        def wide(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.detach().double().requires_grad_(value.requires_grad)

        arguments = tuple(wide(value) for value in call.arguments)
        leaves = tuple(
            new for old, new in zip(call.arguments, arguments, strict=True) if any(old is leaf for leaf in call.leaves)
        )
        return step(definition, Call(arguments, leaves, tuple(one.double() for one in call.upstream)))

    return compute


def both(
    name: str, forward: Forward, quick: tuple[str, ...] = ("eager", "compiled"), **options: Any
) -> list[Contender]:
    """Make an eager baseline and its torch.compile version; `quick` says which of them a quick run includes."""
    return [
        Contender(f"eager {name}", forward, quick="eager" in quick, **options),
        Contender(f"compiled {name}", forward, compiled=True, quick="compiled" in quick, **options),
    ]
