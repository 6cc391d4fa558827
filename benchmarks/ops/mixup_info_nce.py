"""mixup_info_nce: the symmetric contrastive loss of a batch, without mixing."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.benchmarks.cases import EVERYTHING, OURS, Call, Case, Contender, Target, both, exact_by
from oner_fast.models.optional_packages import optional_package
from oner_fast.ops import mixup_info_nce, reference
from oner_fast.ops.mixup_info_nce import facts

NO_PROMISE = Target()


def two_cross_entropies(query: Tensor, key: Tensor, logit_scale: Tensor, labels: Tensor) -> Tensor:
    """Compute the loss as CLIP and open_clip write it."""
    q, k = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    logits = logit_scale.to(q.dtype) * q @ k.T
    return (F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.T.float(), labels)) / 2


def two_log_sum_exps(query: Tensor, key: Tensor, logit_scale: Tensor, labels: Tensor) -> Tensor:
    """Compute the diagonal from the vectors themselves, so that only two reductions read the logits."""
    q, k = F.normalize(query.float(), dim=-1), F.normalize(key.float(), dim=-1)
    scaled = (logit_scale * q).to(query.dtype)
    logits = (scaled @ k.to(key.dtype).T).float()
    diagonal = logit_scale * (q * k).sum(-1)
    return ((logits.logsumexp(1) + logits.logsumexp(0)) / 2 - diagonal).mean()


def linear_cross_entropy(query: Tensor, key: Tensor, logit_scale: Tensor, labels: Tensor) -> Tensor:
    """Use PyTorch's fused projection and cross-entropy, once for each direction."""
    q, k = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    scaled = logit_scale.to(q.dtype) * q
    rows = F.linear_cross_entropy(scaled, k, labels)
    return (rows + F.linear_cross_entropy(logit_scale.to(k.dtype) * k, q, labels)).float() / 2


@cache
def clip_loss() -> Any:
    """Make open_clip's loss as its training makes it for one process."""
    return optional_package("open_clip").ClipLoss(cache_labels=True)


def open_clip(query: Tensor, key: Tensor, logit_scale: Tensor) -> Tensor:
    """Compute what open_clip's training with `--precision amp_bf16` computes on this device.

    The model's output is normalised and given to `ClipLoss`, both under autocast to bfloat16: the logits are a product
    in bfloat16, the cross-entropies take them in float32. CUDA's autocast normalises in float32, the CPU's in the
    features' dtype.
    """
    with torch.autocast(query.device.type, torch.bfloat16):
        loss = clip_loss()(F.normalize(query, dim=-1), F.normalize(key, dim=-1), logit_scale)
    assert isinstance(loss, Tensor)
    return loss


def open_clip_as_on_a_gpu(query: Tensor, key: Tensor, logit_scale: Tensor) -> Tensor:
    """Compute the same with the features normalised in float32 on any device, as CUDA's autocast does."""
    return open_clip(query.float(), key.float(), logit_scale)


def with_labels(call: Call) -> Call:
    """Add the labels, which are the row numbers, computed beforehand."""
    query = call.arguments[0]
    labels = torch.arange(query.shape[0], device=query.device)
    return Call((*call.arguments, labels), call.leaves, call.upstream)


def contenders(dtype: torch.dtype) -> list[Contender]:
    baselines = [
        *both("two cross-entropies", two_cross_entropies, quick=("eager",), layout=with_labels),
        *both("two log-sum-exps", two_log_sum_exps, layout=with_labels),
    ]
    if hasattr(F, "linear_cross_entropy"):
        baselines.append(Contender("eager F.linear_cross_entropy", linear_cross_entropy, layout=with_labels))
    if dtype == torch.bfloat16 and find_spec("open_clip") is not None:
        baselines += [
            Contender("eager open_clip ClipLoss, amp_bf16", open_clip, quick=False),
            Contender("eager open_clip ClipLoss, amp_bf16, float32 norms", open_clip_as_on_a_gpu),
        ]
    return [Contender(OURS, mixup_info_nce), *baselines]


FIRST_SCALE, LAST_SCALE = 1 / 0.07, 100.0
"""The logit scale with which CLIP's training starts, and the bound at which it usually ends."""


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
        )
        return Call(leaves, leaves, (torch.ones((), device=device),))

    notes: tuple[str, ...] = ()
    if measured == ("memory",):
        notes = (f"memory alone: N x N logits would take {4 * rows * rows / 1e9:.1f} GB",)
    elif measured == ("precision",):
        notes = ("errors alone: the scale does not change the time",)
    size = torch.empty(0, dtype=dtype).element_size()
    return Case(
        op="mixup_info_nce",
        shape=f"N {rows}, D {width}" + ("" if scale == FIRST_SCALE else f", logit scale {scale:g}"),
        dtype=dtype,
        make=make,
        contenders=contenders(dtype) if "precision" in measured else [Contender(OURS, mixup_info_nce)],
        exact=exact_by(reference.mixup_info_nce),
        facts=facts,
        # Logits, logits again in backward, and the two products of the gradients, which O(N D) memory requires.
        flops=8.0 * rows * rows * width,
        bytes=float(6 * rows * width * size),
        limit="gemm",
        target=target,
        measured=measured,
        notes=notes,
        # Two inverse norms, maximum and sum of rows and of columns, and the mixing share, which is one number.
        saved=6 * rows * 4 + 4,
        counted=6.0 * rows * rows * width if timed else None,
    )


def cases(quick: bool) -> list[Case]:
    wide, narrow = torch.float32, torch.bfloat16
    if quick:
        return [
            case(1024, 256, wide, Target(speedup=1.0, eager=2.5)),
            case(1024, 256, narrow, Target(speedup=1.25)),
        ]
    return [
        case(4096, 256, wide, Target(speedup=1.0, eager=2.5, memory_share=1 / 10)),
        case(4096, 256, narrow, Target(speedup=1.25, memory_share=1 / 6)),
        case(4096, 256, narrow, scale=LAST_SCALE, measured=("precision",)),
        case(32768, 256, wide, Target(memory_bytes=300_000_000), measured=("memory",)),
    ]
