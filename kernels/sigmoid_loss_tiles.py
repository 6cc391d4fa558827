"""A tile of logits in sigmoid_loss: its terms in forward, its gradient in backward.

A pair that belongs together is one whose logit changes its sign: its term is log(1 + exp(-l)), and its gradient is
-sigmoid(-l). No difference of two numbers near 1 is taken. Only partners have targets between 0 and 1.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from oner_fast.kernels.launch import Compilation, Configuration
from oner_fast.kernels.mixup_info_nce_tiles import binary
from oner_fast.kernels.mixup_info_nce_tiles import compilation as _compilation

OP = "sigmoid_loss"


@triton.jit
def _log1p(x):
    """Compute log(1 + x) for x in [0, 1] within 2 units in the last place: x times a polynomial of degree 9.

    The polynomial is that of log(1 + x) / x at ten Chebyshev nodes. The logarithm of the rounded sum 1 + x would lose
    the small numbers that most pairs of a large batch add.
    """
    p = -3.1760570127516985e-3 * x + 1.9542526453733444e-2
    p = p * x - 5.6373611092567444e-2
    p = p * x + 1.0543623566627502e-1
    p = p * x - 1.5269666910171509e-1
    p = p * x + 1.9663274288177490e-1
    p = p * x - 2.4951615929603577e-1
    p = p * x + 3.3329710364341736e-1
    p = p * x - 4.9999892711639404e-1
    return (p * x + 1.0) * x


@triton.jit
def sigmoid(x):
    """Compute 1 / (1 + exp(-x)); the exponential may be infinite, where the result is 0."""
    return 1.0 / (1.0 + tl.exp2(binary(-x)))


@triton.jit
def term(logit, hinge):
    """Compute log(1 + exp(logit)) - target * logit, where `hinge` is max(logit, 0) - target * logit."""
    return hinge + _log1p(tl.exp2(binary(-tl.abs(logit))))


@triton.jit
def soft_targets(at_own, own, at_partner, shared):
    """Compute the targets of a tile whose rows have partners; a row may be its own partner."""
    return tl.where(at_own, own, 0.0) + tl.where(at_partner, shared, 0.0)


@triton.jit
def soft_gradient(logit, target):
    """Compute sigmoid(logit) - target without cancellation."""
    return (1.0 - target) * sigmoid(logit) - target * sigmoid(-logit)


def compilation(
    name: str, kernel: Any, constexprs: dict[str, Any], chosen: Configuration, elements: str, element: str
) -> Compilation:
    """Return a kernel with products, whose multiplications and additions may fuse: no exact difference is needed."""
    return _compilation(name, kernel, constexprs, chosen, elements, element, products=True, exact=False, op=OP)
