"""Make one definition of an op's forward and backward serve plain autograd and the transforms of `torch.func`.

The transforms need a `torch.autograd.Function` with a `setup_context`. At every call, PyTorch reads the signature of
such a function's forward, which takes longer than a small op. An op therefore has two classes, both made here from one
definition: a plain one, and one that is called only inside a transform.

Inside `vmap` the second class runs the op's raw ops under `vmap`, whose batching rules are in `oner_fast.ops.batching`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

Values = tuple[Any, ...]


class Definition(Protocol):
    """The forward and the backward of an op."""

    @staticmethod
    def compute(*arguments: Any) -> Values:
        """Return the op's result, then everything else that backward reads."""

    @staticmethod
    def remember(ctx: Any, arguments: Values, results: Values) -> None:
        """Keep what backward needs; `ctx.save_for_backward` takes arguments and results of `compute` alone."""

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> Values:
        """Return the gradient of each argument, given that of the op's result."""


def inside_transform() -> bool:
    """Return whether a transform of `torch.func` (vmap, grad, jacrev, ...) is active."""
    return bool(torch._C._are_functorch_transforms_active())


def differentiable(op: str, definition: type[Definition]) -> Callable[..., Any]:
    """Return a function that takes the arguments of `definition.compute` and returns the first result, with gradients.

    A second derivative is refused with a RuntimeError, and so is a derivative in forward mode.
    """
    compute, remember, gradients = definition.compute, definition.remember, definition.gradients

    def backward(ctx: Any, grad: Tensor, *rest: Any) -> Values:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gradients(ctx, grad)
        with torch.no_grad():
            found = gradients(ctx, grad)
        refusing: Values = _Once.apply(op, len(found), *found, grad, *ctx.saved_tensors)
        return refusing

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            results = compute(*arguments)
            remember(ctx, arguments, results)
            return results[0]

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def setup_context(ctx: Any, inputs: Values, output: Values) -> None:
            remember(ctx, inputs, output)
            ctx.mark_non_differentiable(*[x for x in output[1:] if isinstance(x, Tensor)])

    Transformed.forward = staticmethod(compute)  # type: ignore[assignment]

    class ForwardMode(Transformed):  # apart: torch.compile traces no class that defines a jvp
        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(
                f"{op}: {_COMPILED} have no derivative in forward mode (jvp, jacfwd, hessian, dual numbers); "
                "take torch.func.vjp or jacrev, or implementation='reference'"
            )

    broken = (
        f"{op}: torch.compile traces no gradient of {_COMPILED} inside a transform of torch.func; compile the function "
        "that the transform takes, or take implementation='reference'"
    )

    for function in (Plain, Transformed, ForwardMode):
        function.__name__ = function.__qualname__ = op  # autograd names its nodes so
        function.backward = staticmethod(backward)  # type: ignore[assignment]

    def apply(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            return ForwardMode.apply(*arguments)[0]
        if inside_transform():
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg=broken)  # inside a transform it would trace no gradient
            return Transformed.apply(*arguments)[0]
        return Plain.apply(*arguments)

    return apply


_COMPILED = "the compiled implementations"


class _Once(torch.autograd.Function):
    """Return the first `count` tensors, and refuse a derivative with respect to any of the tensors.

    `torch.autograd.function.once_differentiable` refuses only where the incoming gradient wants one itself. A penalty
    on a gradient would otherwise be lost in silence.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return tuple(None if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Values, output: Values) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.op}: trying to differentiate twice, but {_COMPILED} are once_differentiable; "
            "implementation='reference' has a second derivative"
        )
