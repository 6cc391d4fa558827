"""padded_attention: a batch of captions with padding, and images without, against PyTorch's attention with a mask."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from oner_fast.benchmarks.cases import OURS, Call, Case, Contender, both, exact_by
from oner_fast.benchmarks.ops.varlen_attention import STATISTICS, explicit, fused, in_float32, padded, padded_in_float32
from oner_fast.ops import padded_attention, reference
from oner_fast.ops.padded_attention import facts

HEADS, WIDTH = 12, 64


def with_mask(call: Call, causal: bool, additive: bool) -> Call:
    """Give keys and queries that see each other as a mask, boolean or additive, made beforehand."""
    query, key, value, lengths = call.arguments
    rows, device = query.shape[2], query.device
    leaves = tuple(x.detach().contiguous().requires_grad_() for x in (query, key, value))
    if lengths is None:
        return Call(leaves, leaves, call.upstream)
    seen = (torch.arange(rows, device=device) < lengths.unsqueeze(1))[:, None, None].expand(-1, 1, rows, -1)
    if causal:
        seen = seen & torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
    if additive:
        seen = torch.zeros(seen.shape, dtype=query.dtype, device=device).masked_fill(~seen, -torch.inf)
    return Call((*leaves, seen), leaves, call.upstream)


def masked_softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend by two batched products with a masked softmax between them, whose scores are kept for backward."""
    scores = query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)
    return (scores + mask).softmax(-1) @ value


def baselines(dtype: torch.dtype, masked: bool, causal: bool) -> list[Contender]:
    boolean, additive = (partial(with_mask, causal=causal, additive=x) for x in (False, True))
    if masked:
        found = [
            Contender("eager SDPA, mask", padded, boolean),
            Contender("eager SDPA, additive mask", padded, additive, quick=False),
            *both("softmax, additive mask", masked_softmax, layout=additive),
        ]
    else:
        found = [Contender("eager SDPA", fused, boolean), *both("softmax", explicit, layout=boolean)]
    if dtype != torch.float32:
        wide = padded_in_float32 if masked else in_float32(fused)
        found += both("SDPA in float32", wide, layout=boolean, quick=("eager",))
    return found


def ours(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, *, causal: bool) -> Tensor:
    return padded_attention(query, key, value, key_lengths=lengths, causal=causal)


def definition(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, *, causal: bool) -> Tensor:
    return reference.padded_attention(query, key, value, key_lengths=lengths, causal=causal)


def case(label: str, rows: int, lengths: list[int], dtype: torch.dtype, causal: bool = False) -> Case:
    """Make a case of `len(lengths)` samples of `rows` places; lengths that all equal `rows` are not given."""
    masked, batch = min(lengths) < rows, len(lengths)

    def make(seed: int, device: str) -> Call:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(batch, rows, HEADS, WIDTH, generator=generator) for _ in range(4)]
        # The heads of a row lie side by side, as a projection writes them.
        query, key, value, upstream = (x.to(device, dtype).transpose(1, 2) for x in drawn)
        leaves = tuple(x.requires_grad_() for x in (query, key, value))
        known = torch.tensor(lengths, dtype=torch.int32, device=device) if masked else None
        return Call((*leaves, known), leaves, (upstream,))

    def known_facts(query: Tensor, key: Tensor, value: Tensor, known: Tensor | None) -> Any:
        return facts(query, key, value, key_lengths=known, causal=causal)

    if causal:
        pairs = sum(min(length, row + 1) for length in lengths for row in range(rows))
    else:
        pairs = rows * sum(lengths)
    size = torch.empty(0, dtype=dtype).element_size()
    return Case(
        op="padded_attention",
        shape=f"{label}, {HEADS} heads of {WIDTH}",
        dtype=dtype,
        make=make,
        contenders=[Contender(OURS, partial(ours, causal=causal)), *baselines(dtype, masked, causal)],
        exact=exact_by(partial(definition, causal=causal)),
        facts=known_facts,
        # Seven products: two in forward; the scores again and four gradients in backward.
        flops=14.0 * pairs * HEADS * WIDTH,
        # Queries, outputs and their gradients of every place; keys, values and their gradients of those that are seen.
        bytes=float((6 * rows * batch + 6 * sum(lengths)) * HEADS * WIDTH * size),
        limit="gemm",
        # The output, the statistics of each query and head, and for a causal mask how many keys each query sees.
        saved=batch * rows * (HEADS * (WIDTH * size + STATISTICS * 4) + 4 * causal),
        counted=12.0 * batch * rows**2 * HEADS * WIDTH,
    )


def cases(quick: bool) -> list[Case]:
    wide, narrow = torch.float32, torch.bfloat16
    batch = 8 if quick else 32
    captions = [16 + 16 * (i % 8) for i in range(batch)]  # 72 of 128 places on average
    label = f"{batch} captions of 16 to 128 tokens"
    found = [case(label, 128, captions, wide), case(label, 128, captions, narrow)]
    if not quick:
        found += [
            case(f"{label}, causal", 128, captions, wide, causal=True),
            case("16 images of 197 tokens", 197, [197] * 16, wide),
            case("16 images of 197 tokens", 197, [197] * 16, narrow),
        ]
    return found
