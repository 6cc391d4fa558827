"""sigmoid_loss: SigLIP's pairwise loss of a batch, at the scale and the bias with which its training begins."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.benchmarks.cases import EVERYTHING, OURS, Call, Case, Contender, Target, both, exact_by
from oner_fast.models.optional_packages import optional_package
from oner_fast.ops import reference, sigmoid_loss
from oner_fast.ops.sigmoid_loss import facts

NO_PROMISE = Target()


def with_labels(call: Call) -> Call:
    """Add the labels, 1 on the diagonal and -1 elsewhere, computed beforehand."""
    query = call.arguments[0]
    labels = 2 * torch.eye(query.shape[0], device=query.device, dtype=query.dtype) - 1
    return Call((*call.arguments, labels), call.leaves, call.upstream)


def log_sigmoid(query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss as SigLIP's paper and open_clip write it."""
    q, k = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    logits = logit_scale.to(q.dtype) * q @ k.T + logit_bias.to(q.dtype)
    return -F.logsigmoid(labels * logits).sum().float() / query.shape[0]


def softplus_and_diagonal(query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Compute log(1 + exp(l)) of every logit and subtract the diagonal, so that no N x N labels are read."""
    q, k = F.normalize(query.float(), dim=-1), F.normalize(key.float(), dim=-1)
    logits = (logit_scale * q).to(query.dtype) @ k.to(key.dtype).T + logit_bias
    own = logit_scale * (q * k).sum(-1) + logit_bias
    return (F.softplus(logits.float()).sum() - own.sum()) / query.shape[0]


@cache
def siglip_loss() -> Any:
    """Make open_clip's loss as its training makes it for one process."""
    return optional_package("open_clip").loss.SigLipLoss()


def open_clip(query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Compute what open_clip's training with `--siglip --precision amp_bf16` computes on this device."""
    with torch.autocast(query.device.type, torch.bfloat16):
        loss = siglip_loss()(F.normalize(query, dim=-1), F.normalize(key, dim=-1), logit_scale, logit_bias)
    assert isinstance(loss, Tensor)
    return loss.float()


def contenders(dtype: torch.dtype) -> list[Contender]:
    baselines = [
        *both("log-sigmoid of labels", log_sigmoid, layout=with_labels),
        *both("softplus and diagonal", softplus_and_diagonal),
    ]
    if dtype == torch.bfloat16 and find_spec("open_clip") is not None:
        baselines.append(Contender("eager open_clip SigLipLoss, amp_bf16", open_clip, quick=False))
    return [Contender(OURS, sigmoid_loss), *baselines]


FIRST_SCALE, FIRST_BIAS = 10.0, -10.0
"""The logit scale and bias with which SigLIP's training starts."""


def case(
    rows: int,
    width: int,
    dtype: torch.dtype,
    target: Target = NO_PROMISE,
    scale: float = FIRST_SCALE,
    measured: tuple[str, ...] = EVERYTHING,
) -> Case:
    timed = "time" in measured

    def make(seed: int, device: str) -> Call:
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(rows, width, generator=generator)
        key = 0.3 * query + torch.randn(rows, width, generator=generator)  # half trained: the loss is well above 0
        leaves = (
            query.to(device, dtype).requires_grad_(),
            key.to(device, dtype).requires_grad_(),
            torch.tensor(scale, device=device, requires_grad=True),
            torch.tensor(FIRST_BIAS, device=device, requires_grad=True),
        )
        return Call(leaves, leaves, (torch.ones((), device=device),))

    notes: tuple[str, ...] = ()
    if measured == ("memory",):
        notes = (f"memory alone: N x N logits would take {4 * rows * rows / 1e9:.1f} GB",)
    elif measured == ("precision",):
        notes = ("errors alone: the scale does not change the time",)
    size = torch.empty(0, dtype=dtype).element_size()
    return Case(
        op="sigmoid_loss",
        shape=f"N {rows}, D {width}" + ("" if scale == FIRST_SCALE else f", logit scale {scale:g}"),
        dtype=dtype,
        make=make,
        contenders=contenders(dtype) if "precision" in measured else [Contender(OURS, sigmoid_loss)],
        exact=exact_by(reference.sigmoid_loss),
        facts=facts,
        # Logits, logits again in backward, and the two products of the gradients, which O(N D) memory requires.
        flops=8.0 * rows * rows * width,
        bytes=float(6 * rows * width * size),
        limit="gemm",
        target=target,
        measured=measured,
        notes=notes,
        # Two inverse norms, and the mixing share, which is one number.
        saved=2 * rows * 4 + 4,
        counted=6.0 * rows * rows * width if timed else None,
    )


def cases(quick: bool) -> list[Case]:
    wide, narrow = torch.float32, torch.bfloat16
    if quick:
        return [case(1024, 256, wide), case(1024, 256, narrow)]
    return [
        case(4096, 256, wide),
        case(4096, 256, narrow),
        case(4096, 256, narrow, scale=100.0, measured=("precision",)),
        case(32768, 256, wide, Target(memory_bytes=300_000_000), measured=("memory",)),
    ]
