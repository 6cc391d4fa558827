"""masked_gather: half of the tokens of a batch of images, with their positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.benchmarks.cases import OURS, Call, Case, Contender, Target, both, exact_by
from oner_fast.ops import masked_gather, reference
from oner_fast.ops.masked_gather import facts


def random_kept(batch: int, tokens: int, kept: int, generator: torch.Generator) -> Tensor:
    """Draw (batch, kept) int64: another random choice for each sample, in random order, as masking draws it."""
    return torch.rand(batch, tokens, generator=generator).argsort(dim=1)[:, :kept].contiguous()


def add_then_gather(tokens: Tensor, kept: Tensor, positions: Tensor) -> Tensor:
    return (tokens + positions).gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def gather_then_add(tokens: Tensor, kept: Tensor, positions: Tensor) -> Tensor:
    return tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])) + positions[kept]


def index_select(tokens: Tensor, rows: Tensor, kept: Tensor, positions: Tensor) -> Tensor:
    return tokens.index_select(0, rows) + positions.index_select(0, kept)


def embedding(tokens: Tensor, rows: Tensor, kept: Tensor, positions: Tensor) -> Tensor:
    return F.embedding(rows, tokens) + F.embedding(kept, positions)


def flat(call: Call) -> Call:
    """Lay out tokens as rows (B * N, D), with the rows' numbers computed beforehand."""
    tokens, kept, positions = call.arguments
    batch, count, width = tokens.shape
    rows = (kept + count * torch.arange(batch, device=kept.device).unsqueeze(1)).flatten()
    leaf = tokens.detach().view(batch * count, width).requires_grad_()
    return Call((leaf, rows, kept.flatten(), positions), (leaf, positions), (call.upstream[0].view(-1, width),))


def case(batch: int, tokens: int, width: int, kept: int, dtype: torch.dtype, target: Target) -> Case:
    def make(seed: int, device: str) -> Call:
        generator = torch.Generator().manual_seed(seed)
        given = torch.randn(batch, tokens, width, generator=generator).to(device, dtype).requires_grad_()
        positions = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
        chosen = random_kept(batch, tokens, kept, generator).to(device)
        upstream = torch.randn(batch, kept, width, generator=generator).to(device, dtype)
        return Call((given, chosen, positions), (given, positions), (upstream,))

    def restore(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out, tokens_grad, positions_grad = results
        return out.view(batch, kept, width), tokens_grad.view(batch, tokens, width), positions_grad

    size = torch.empty(0, dtype=dtype).element_size()
    row, indices = width * size, batch * kept * 8
    # Kept tokens in and out, then their gradient in and the gradient of all tokens out; positions once each way.
    moved = 3 * batch * kept * row + batch * tokens * row + 2 * tokens * row + 2 * indices
    return Case(
        op="masked_gather",
        shape=f"({batch}, {tokens}, {width}) keep {kept} + positions",
        dtype=dtype,
        make=make,
        contenders=[
            Contender(OURS, masked_gather),
            *both("add, gather", add_then_gather),
            *both("gather, add", gather_then_add, quick=()),
            *both("index_select", index_select, quick=(), layout=flat, restore=restore),
            *both("embedding", embedding, quick=("eager",), layout=flat, restore=restore),
        ],
        exact=exact_by(reference.masked_gather),
        facts=facts,
        flops=2.0 * batch * kept * width,
        bytes=float(moved),
        limit="copy",
        target=target,
    )


def cases(quick: bool) -> list[Case]:
    if quick:
        return [case(16, 196, 768, 98, torch.float32, Target(speedup=4.0))]
    return [
        case(64, 196, 768, 98, torch.float32, Target(speedup=4.0, share=0.5)),
        case(64, 196, 768, 98, torch.bfloat16, Target()),
    ]
