"""Workloads on which tiles are timed: the benchmarks' own shapes, and one for each other class of shapes.

No training uses float64, or other head sizes in float32: their tiles have no workload and stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from oner_fast.benchmarks.cases import OURS, Call, Case, Forward, Target, name_of, step
from oner_fast.benchmarks.ops import cases, masked_gather, mixup_info_nce, sigmoid_loss, token_alignment
from oner_fast.benchmarks.ops.gather_patches import MEAN, STD
from oner_fast.benchmarks.ops.masked_gather import random_kept
from oner_fast.ops import gather_patches, varlen_attention
from oner_fast.ops import masked_gather as gather_tokens
from oner_fast.ops import mixup_info_nce as contrast
from oner_fast.ops import sigmoid_loss as sigmoid_contrast

_HALF, _WIDE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Workload:
    """One call of an op, as its Triton kernels compute it.

    Args:
        name: unique among all workloads.
        op: name of the op's file of tiles.
        dtype: dtype whose rounding error sets the tolerance when results are compared.
        make: makes the call of a seed on a device.
        forward: called with the call's arguments.
        implementation: "triton" or "triton_atomic".
    """

    name: str
    op: str
    dtype: torch.dtype
    make: Callable[[int, str], Call]
    forward: Forward
    implementation: str = "triton"

    def run(self, phase: str, call: Call) -> tuple[Tensor, ...]:
        """Results of "forward" alone, or of "step", which adds the gradients where there are any."""
        with _served_by(self.implementation):
            if phase == "step":
                return step(self.forward, call)
            with torch.no_grad():
                return step(self.forward, Call(call.arguments))


@contextmanager
def _served_by(implementation: str) -> Iterator[None]:
    """Force an implementation for every op that has no environment variable of its own."""
    variable = "ONER_FAST_IMPLEMENTATION"
    before = os.environ.get(variable)
    os.environ[variable] = implementation
    try:
        yield
    finally:
        os.environ.pop(variable) if before is None else os.environ.update({variable: before})


def workloads(op: str) -> list[Workload]:
    """List the workloads of an op, by the name of its file of tiles."""
    if op == "patch_masks":
        return [*(_masks(side, pattern) for side in (14, 32, 64) for pattern in ("random", "block")), _boundaries()]
    if op == "gather_patches":
        return [_patch_gathers(dtype) for dtype in (torch.uint8, _HALF)]
    own = [_of(case) for case in cases(ops=[op]) if case.timed]
    return [*own, *_MORE[op]()]


def _of(case: Case, implementation: str = "triton") -> Workload:
    name = case.key if implementation == "triton" else f"{case.key}, {implementation}"
    return Workload(name, case.op, case.dtype, case.make, case.contender(OURS).forward, implementation)


def _drawn(seed: int, device: str, dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes]


def _attention(
    lengths: Sequence[int], heads: int, head_dim: int, dtype: torch.dtype, dropout_p: float = 0.0
) -> Workload:  # fmt: skip
    total, longest = sum(lengths), max(lengths)

    def make(seed: int, device: str) -> Call:
        query, key, value, grad = _drawn(seed, device, dtype, *[(total, heads, head_dim)] * 4)
        leaves = tuple(one.requires_grad_() for one in (query, key, value))
        boundaries = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
        return Call((*leaves, boundaries), leaves, (grad,))

    forward = partial(
        varlen_attention, max_seqlen_q=longest, max_seqlen_k=longest, dropout_p=dropout_p, dropout_seed=1
    )  # fmt: skip
    name = f"varlen_attention {len(lengths)} sequences, {heads} heads of {head_dim} {name_of(dtype)}"
    name += " with dropout" if dropout_p else ""
    return Workload(name, "varlen_attention", dtype, make, forward)


def _more_attention() -> list[Workload]:
    lengths, width = [197, 40, 237] * 40, 1536
    half = [(size, _HALF) for size in (32, 64, 80, 96, 128, 256)]
    wide = [(size, _WIDE) for size in (32, 64, 96, 128)]
    dropping = [(64, _HALF), (128, _HALF), (256, _HALF), (64, _WIDE), (128, _WIDE)]
    return [
        *(_attention(lengths, max(width // size, 1), size, dtype) for size, dtype in (*half, *wide)),
        *(_attention(lengths, max(width // size, 1), size, dtype, 0.1) for size, dtype in dropping),
    ]


def _contrast(rows: int, width: int, dtype: torch.dtype, mark: str, op: str = "mixup_info_nce") -> Workload:
    """Make a contrastive loss with partners, or with mixing on both sides."""
    losses: dict[str, Callable[..., Tensor]] = {"mixup_info_nce": contrast, "sigmoid_loss": sigmoid_contrast}

    def make(seed: int, device: str) -> Call:
        drawn = _drawn(seed, device, dtype, *[(rows, width)] * 4)
        leaves = tuple(one.requires_grad_() for one in drawn[: 4 if mark == "mixed" else 2])
        more: tuple[Tensor, ...] = (torch.full((rows,), 0.5, device=device),)
        if mark == "partner":
            more = (torch.arange(rows, device=device).flip(0), *more)
        arguments = (*leaves[:2], torch.tensor(14.0, device=device), *leaves[2:], *more)
        return Call(arguments, leaves, (torch.ones((), device=device),))

    def forward(query: Tensor, key: Tensor, logit_scale: Tensor, *rest: Tensor) -> Tensor:
        names = ("partner", "partner_weight") if mark == "partner" else ("query_other", "key_other", "mix")
        more: dict[str, Any] = dict(zip(names, rest, strict=True))
        return losses[op](query, key, logit_scale, **more)

    return Workload(f"{op} N {rows}, D {width} {mark} {name_of(dtype)}", op, dtype, make, forward)


def _more_contrasts() -> list[Workload]:
    plain = [
        mixup_info_nce.case(rows, width, dtype, Target())
        for rows, width, dtype in (
            (8192, 64, _HALF), (8192, 128, _HALF), (8192, 512, _HALF), (8192, 1024, _HALF), (4096, 2048, _HALF),
            (4096, 64, _WIDE), (4096, 128, _WIDE), (4096, 512, _WIDE),
        )
    ]  # fmt: skip
    atomic = [_of(mixup_info_nce.case(8192, width, _HALF, Target()), "triton_atomic") for width in (64, 128)]
    partner = [_contrast(8192, width, _HALF, "partner") for width in (64, 128, 256, 512)]
    mixed = [_contrast(8192, width, _HALF, "mixed") for width in (64, 128, 512)]
    return [*map(_of, plain), *atomic, *partner, *mixed]


def _more_sigmoid_losses() -> list[Workload]:
    halves = [(8192, width, _HALF) for width in (64, 128, 512, 1024)]
    plain = [sigmoid_loss.case(rows, width, dtype) for rows, width, dtype in (*halves, (4096, 512, _WIDE))]
    partner = [_contrast(8192, width, _HALF, "partner", "sigmoid_loss") for width in (64, 128, 256)]
    mixed = [_contrast(8192, width, _HALF, "mixed", "sigmoid_loss") for width in (64, 128)]
    return [*map(_of, plain), *partner, *mixed]


def _more_token_gathers() -> list[Workload]:
    """List gathers of more samples, whose position sums are made in groups, and gathers without positions."""
    grouped = _of(masked_gather.case(256, 196, 768, 98, _HALF, Target()))

    def plain(dtype: torch.dtype) -> Workload:
        def make(seed: int, device: str) -> Call:
            tokens, grad = _drawn(seed, device, dtype, (64, 196, 768), (64, 98, 768))
            kept = random_kept(64, 196, 98, torch.Generator().manual_seed(seed)).to(device)
            return Call((tokens.requires_grad_(), kept), (tokens,), (grad,))

        name = f"masked_gather (64, 196, 768) keep 98 {name_of(dtype)}"
        return Workload(name, "masked_gather", dtype, make, gather_tokens)

    return [grouped, plain(_HALF), plain(_WIDE)]


def _patch_gathers(dtype: torch.dtype) -> Workload:
    """Make the benchmark's own gather, of bytes, and one of images that take a gradient.

    Constants are on the device, as they could not be copied to it while a graph is captured.
    """

    def make(seed: int, device: str) -> Call:
        images, grad = _drawn(seed, device, _HALF, (64, 3, 224, 224), (64, 98, 768))
        kept = random_kept(64, 196, 98, torch.Generator().manual_seed(seed)).to(device)
        mean, std = (torch.tensor(one, dtype=torch.float64, device=device) for one in (MEAN, STD))
        if dtype == torch.uint8:
            return Call(((images * 40 + 128).clamp(0, 255).to(dtype), kept, 16, mean, std))
        return Call((images.requires_grad_(), kept, 16, mean, std), (images,), (grad,))

    name = f"gather_patches 64 x 3 x 224 x 224 {name_of(dtype)}, patch 16, keep 98 of 196"
    return Workload(name, "gather_patches", _WIDE if dtype == torch.uint8 else dtype, make, gather_patches)


def _more_alignments() -> list[Workload]:
    return [_of(token_alignment.case(256, 196, 256, 98, dtype, Target())) for dtype in (_HALF, _WIDE)]


_MORE: dict[str, Callable[[], list[Workload]]] = {
    "masked_gather": _more_token_gathers,
    "mixup_info_nce": _more_contrasts,
    "sigmoid_loss": _more_sigmoid_losses,
    "token_alignment": _more_alignments,
    "varlen_attention": _more_attention,
}


def _masks(side: int, pattern: str) -> Workload:
    def make(seed: int, device: str) -> Call:
        return Call((torch.arange(seed * 1024, (seed + 1) * 1024, device=device),))

    def draw(samples: Tensor) -> tuple[Tensor, Tensor]:
        from oner_fast.kernels.patch_masks import draw_masks

        return draw_masks((1, 2), 0, 0, samples, (side, side), side * side // 2, pattern)

    return Workload(f"patch_masks {pattern} masks of {side} x {side}", "patch_masks", torch.int64, make, draw)


def _boundaries() -> Workload:
    def make(seed: int, device: str) -> Call:
        return Call((torch.arange(16384, device=device) % 99,))

    def sums(counts: Tensor) -> Tensor:
        from oner_fast.kernels.patch_masks import boundaries

        return boundaries(counts)

    return Workload("patch_masks boundaries of 16384", "patch_masks", torch.int64, make, sums)
