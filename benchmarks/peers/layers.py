"""Layers of our models that apex or xFormers have too: LayerNorm, AdamW and SwiGLU.

"oner_fast" is what our models use there, which for LayerNorm and AdamW is PyTorch's own. The cases show whether a
package would serve better. They exist only where their package is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oner_fast.benchmarks.cases import OURS, Call, Case, Contender, Result, exact_by
from oner_fast.doctor import find_apex, find_peer
from oner_fast.nn.swiglu import silu_gate

# Tokens of 64 images of 14 x 14 patches with [CLS], and the widths of a ViT-B and of UTA's SwiGLU.
ROWS, WIDTH, HIDDEN = 64 * 197, 768, 2048
RATE, BETAS, EPS, DECAY = 1e-3, (0.9, 0.98), 1e-6, 0.1
SHAPES = ((3072, 768), (768, 3072), (2304, 768), (768, 768))
_CUDA = ("cuda",)


def cases(rows: int = ROWS, width: int = WIDTH, hidden: int = HIDDEN) -> list[Case]:
    """List the cases whose package is installed; none without apex and xFormers."""
    found = []
    if find_apex()[0]:
        found += [layer_norm(rows, width, dtype) for dtype in (torch.float32, torch.bfloat16)]
        found.append(adamw(SHAPES))
    if find_peer("xformers", "xformers"):
        found.append(swiglu(rows, width, hidden, torch.bfloat16))
    return found


def layer_norm(rows: int, width: int, dtype: torch.dtype) -> Case:
    """Normalise (rows, width) with weights of the same dtype, forward and backward."""

    def make(seed: int, device: str) -> Call:
        draw = torch.Generator().manual_seed(seed)
        shapes = ((rows, width), (width,), (width,), (rows, width))
        drawn = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
        leaves = tuple(one.requires_grad_() for one in drawn[:3])
        return Call(leaves, leaves, (drawn[3],))

    size = torch.empty(0, dtype=dtype).element_size()
    return Case(
        op="layer_norm", shape=f"({rows}, {width})", dtype=dtype, make=make,
        contenders=[
            Contender(OURS, _torch_norm),
            Contender("compiled F.layer_norm", _torch_norm, compiled=True),
            Contender("eager apex FusedLayerNorm", _apex_norm, devices=_CUDA),
        ],
        exact=exact_by(_torch_norm), flops=8.0 * rows * width, bytes=float(5 * rows * width * size), limit="copy",
        served="torch",
    )  # fmt: skip


def _torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _apex_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    package = importlib.import_module("apex.normalization.fused_layer_norm")
    result: Tensor = package.fused_layer_norm_affine(x, weight, bias, tuple(weight.shape), EPS)
    return result


def swiglu(rows: int, width: int, hidden: int, dtype: torch.dtype) -> Case:
    """Compute a SwiGLU without inner norm, forward and backward; gate and value are one product."""

    def make(seed: int, device: str) -> Call:
        draw = torch.Generator().manual_seed(seed)
        shapes = ((rows, width), (2 * hidden, width), (2 * hidden,), (width, hidden), (width,), (rows, width))
        drawn = [(torch.randn(shape, generator=draw) * shape[-1] ** -0.5).to(device, dtype) for shape in shapes]
        leaves = tuple(one.requires_grad_() for one in drawn[:5])
        return Call(leaves, leaves, (drawn[5],))

    def packed(call: Call) -> Call:
        """Give xFormers gate and value as one (2, hidden, width) tensor, its fastest layout."""
        x, gate_value, bias, *out = call.arguments
        both = [one.detach().unflatten(0, (2, hidden)).requires_grad_() for one in (gate_value, bias)]
        leaves = (x, *both, *out)
        return Call(leaves, leaves, call.upstream)

    def restore(results: Result) -> Result:
        return (*results[:2], results[2].flatten(0, 1), results[3].flatten(0, 1), *results[4:])

    def ours(x: Tensor, gate_value: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor) -> Tensor:
        return F.linear(silu_gate(F.linear(x, gate_value, bias)), out, out_bias)

    size = torch.empty(0, dtype=dtype).element_size()
    return Case(
        op="swiglu", shape=f"({rows}, {width}), hidden {hidden}", dtype=dtype, make=make,
        contenders=[
            Contender(OURS, ours),
            Contender("eager linear, SiLU, linear", _plain_swiglu),
            Contender("compiled linear, SiLU, linear", _plain_swiglu, compiled=True),
            Contender("eager xFormers SwiGLU", _xformers_swiglu, packed, restore, devices=_CUDA),
        ],
        exact=exact_by(_plain_swiglu), flops=18.0 * rows * width * hidden,
        bytes=float((6 * rows * width + 9 * hidden * width) * size), limit="gemm", served="oner_fast.nn",
    )  # fmt: skip


def _plain_swiglu(x: Tensor, gate_value: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor) -> Tensor:
    gate, value = F.linear(x, gate_value, bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * value, out, out_bias)


def _xformers_swiglu(x: Tensor, gate_value: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor) -> Tensor:
    package = importlib.import_module("xformers.ops")
    gate, value = package.unbind(gate_value, dim=0)
    gate_bias, value_bias = package.unbind(bias, dim=0)
    result: Tensor = package.swiglu(x, gate, gate_bias, value, value_bias, out, out_bias)
    return result


class Update:
    """An optimiser over copies of parameters, whose gradients stay the same in all steps."""

    def __init__(self, call: Call, make: Callable[[nn.ParameterList], torch.optim.Optimizer]) -> None:
        half = len(call.arguments) // 2
        self.parameters = nn.ParameterList(one.detach().clone() for one in call.arguments[:half])
        for parameter, gradient in zip(self.parameters, call.arguments[half:], strict=True):
            parameter.grad = gradient
        self.optimizer = make(self.parameters)

    def __call__(self) -> Result:
        """Take a step; return the parameters."""
        self.optimizer.step()
        return tuple(one.detach() for one in self.parameters)


def adamw(shapes: Sequence[tuple[int, int]]) -> Case:
    """Update the matrices of a transformer's layer in float32. The first step of each contender is compared."""

    def make(seed: int, device: str) -> Call:
        draw = torch.Generator().manual_seed(seed)
        return Call(tuple(torch.randn(shape, generator=draw).to(device) for shape in (*shapes, *shapes)))

    def by(optimizer: Callable[[nn.ParameterList], torch.optim.Optimizer]) -> Callable[[Call], Call]:
        return lambda call: Call((Update(call, optimizer),))

    def exact(call: Call) -> Result:
        wide = Call(tuple(one.double() for one in call.arguments))
        plain = Update(wide, lambda parameters: torch.optim.AdamW(parameters, RATE, BETAS, EPS, DECAY, foreach=False))
        return plain()

    numbers = sum(rows * columns for rows, columns in shapes)
    return Case(
        op="adamw", shape=f"{len(shapes)} matrices, {numbers:,} numbers", dtype=torch.float32, make=make,
        contenders=[
            Contender(OURS, _update, by(_ours)),
            Contender("eager AdamW, foreach", _update, by(_foreach)),
            Contender("eager apex FusedAdam", _update, by(_fused_adam), devices=_CUDA),
        ],
        exact=exact, flops=14.0 * numbers,
        # Parameter and both moments are read and written, the gradient is read.
        bytes=28.0 * numbers, limit="copy", served="torch",
    )  # fmt: skip


def _update(update: Update) -> Result:
    return update()


def _ours(parameters: nn.ParameterList) -> torch.optim.Optimizer:
    """Make the optimiser as `oner_fast.train.engine.optimizer.build_adamw` makes it: PyTorch's, fused."""
    return torch.optim.AdamW(parameters, RATE, BETAS, EPS, DECAY, fused=True)


def _foreach(parameters: nn.ParameterList) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, RATE, BETAS, EPS, DECAY, foreach=True)


def _fused_adam(parameters: nn.ParameterList) -> torch.optim.Optimizer:
    package = importlib.import_module("apex.optimizers")
    made: torch.optim.Optimizer = package.FusedAdam(
        list(parameters), lr=RATE, betas=BETAS, eps=EPS, adam_w_mode=True, weight_decay=DECAY
    )
    return made
