"""varlen_attention: packed images, captions and both together in one batch, against all that PyTorch has on the CPU.

Each baseline gets queries, keys and values in the layout that suits it best, made beforehand: padded and masked,
grouped by length, one tensor for each sequence, or nested. `torch.nn.attention.varlen` has no CPU kernel; on CUDA it is
a baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.benchmarks.cases import OURS, Call, Case, Contender, Result, Target, exact_by
from oner_fast.benchmarks.peers import attention as peers
from oner_fast.ops import reference, varlen_attention
from oner_fast.ops.varlen_attention import facts

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
HEADS, WIDTH = 12, 64
STATISTICS = 2  # float32 numbers kept for each query and head: maximum and 1 / sum


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend by PyTorch's flash attention."""
    return F.scaled_dot_product_attention(query, key, value)


def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend by two batched products with the softmax between them; the scores are kept for backward."""
    return (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1) @ value


def in_float32(attend: Attend) -> Attend:
    """Attend to half-precision inputs in float32, with which the CPU's flash attention is faster."""

    def attend_wide(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query.float(), key.float(), value.float()).to(query.dtype)

    return attend_wide


def each(attend: Attend) -> Callable[..., tuple[Tensor, ...]]:
    """Apply `attend` to every query, key and value of a flat list query, key, value, query, ..."""

    def attend_all(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(attend(*tensors[i : i + 3]) for i in range(0, len(tensors), 3))

    return attend_all


def groups_of(lengths: list[int], by_length: bool) -> list[list[int]]:
    """Group the sequences that are computed together: all of one length, or each sequence alone."""
    if not by_length:
        return [[i] for i in range(len(lengths))]
    return [[i for i, other in enumerate(lengths) if other == length] for length in dict.fromkeys(lengths)]


class Dense:
    """Convert packed (T, H, Dh) to dense (n, H, L, Dh) tensors, one for each group, and back."""

    def __init__(self, lengths: list[int], by_length: bool) -> None:
        self.lengths, self.groups = lengths, groups_of(lengths, by_length)

    def _split(self, packed: Tensor) -> list[Tensor]:
        parts = packed.detach().split(self.lengths)
        return [torch.stack([parts[i] for i in group]).transpose(1, 2).contiguous() for group in self.groups]

    def _join(self, dense: Result) -> Tensor:
        parts = {
            i: one
            for group, tensor in zip(self.groups, dense, strict=True)
            for i, one in zip(group, tensor, strict=True)
        }
        return torch.cat([parts[i].transpose(0, 1) for i in range(len(self.lengths))])

    def layout(self, call: Call) -> Call:
        query, key, value = (self._split(tensor) for tensor in call.arguments[:3])
        flat = tuple(one.requires_grad_() for trio in zip(query, key, value, strict=True) for one in trio)
        return Call(flat, flat, tuple(self._split(call.upstream[0])))

    def restore(self, results: Result) -> Result:
        count = len(self.groups)
        gradients = results[count:]
        return self._join(results[:count]), *(self._join(gradients[i::3]) for i in range(3))


class Padded:
    """Convert packed sequences to (n, H, longest, Dh), padded with zeros under a mask, and back."""

    def __init__(self, lengths: list[int], additive: bool) -> None:
        self.lengths, self.additive = lengths, additive

    def _pad(self, packed: Tensor) -> Tensor:
        rows = torch.nn.utils.rnn.pad_sequence(list(packed.detach().split(self.lengths)), batch_first=True)
        return rows.transpose(1, 2).contiguous()

    def _cut(self, padded: Tensor) -> Tensor:
        return torch.cat([one[:, :length].transpose(0, 1) for one, length in zip(padded, self.lengths, strict=True)])

    def layout(self, call: Call) -> Call:
        leaves = tuple(self._pad(tensor).requires_grad_() for tensor in call.arguments[:3])
        longest, device = max(self.lengths), call.upstream[0].device
        seen = torch.arange(longest, device=device) < torch.tensor(self.lengths, device=device).unsqueeze(1)
        mask = seen[:, None, None, :].expand(-1, 1, longest, -1)
        if self.additive:
            mask = torch.zeros(mask.shape, dtype=call.upstream[0].dtype, device=device).masked_fill(~mask, -torch.inf)
        return Call((*leaves, mask), leaves, (self._pad(call.upstream[0]),))

    def restore(self, results: Result) -> Result:
        return tuple(self._cut(one) for one in results)


def padded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def padded_in_float32(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    mask = mask if mask.dtype == torch.bool else mask.float()
    return padded(query.float(), key.float(), value.float(), mask).to(query.dtype)


def jagged(call: Call) -> Call:
    """Make nested tensors over the packed storage: (n, length, H, Dh), attended transposed."""
    offsets = call.arguments[3].long()

    def nest(packed: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(packed.detach(), offsets)

    leaves = tuple(nest(one).requires_grad_() for one in call.arguments[:3])
    return Call(leaves, leaves, (nest(call.upstream[0]),))


def attend_nested(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (one.transpose(1, 2) for one in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def from_jagged(results: Result) -> Result:
    return tuple(one.values() for one in results)


def packed_by_torch(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int) -> Tensor:
    """Attend by PyTorch's flash attention over packed sequences, which only CUDA has."""
    from torch.nn.attention.varlen import varlen_attn

    found = varlen_attn(query, key, value, boundaries, boundaries, longest, longest)
    assert isinstance(found, Tensor)
    return found


def baselines(lengths: list[int], dtype: torch.dtype) -> list[Contender]:
    found = []

    def add(
        name: str, forward: Callable[..., object], layout: Dense | Padded, compiled: bool = False, quick: bool = True
    ) -> None:
        kind = "compiled" if compiled else "eager"
        found.append(Contender(f"{kind} {name}", forward, layout.layout, layout.restore, compiled, quick))

    grouped, alone = Dense(lengths, True), Dense(lengths, False)
    add("SDPA by length", each(fused), grouped)
    add("softmax by length", each(explicit), grouped)
    add("softmax by length", each(explicit), grouped, compiled=True)
    add("SDPA in a loop", each(fused), alone, quick=False)
    add("SDPA padded, mask", padded, Padded(lengths, additive=False))
    add("SDPA padded, additive mask", padded, Padded(lengths, additive=True), quick=False)
    found.append(Contender("eager SDPA nested", attend_nested, jagged, from_jagged, quick=False))
    if dtype != torch.float32:
        packed = partial(packed_by_torch, longest=max(lengths))
        found.append(Contender("eager torch.nn.attention.varlen", packed, devices=("cuda",)))
        add("SDPA by length in float32", each(in_float32(fused)), grouped)
        add("SDPA by length in float32", each(in_float32(fused)), grouped, compiled=True, quick=False)
        add("SDPA in a loop in float32", each(in_float32(fused)), alone, quick=False)
        add("SDPA padded in float32, mask", padded_in_float32, Padded(lengths, additive=False), quick=False)
    return [*found, *peers.contenders(lengths, dtype)]


def case(lengths: list[int], label: str, dtype: torch.dtype, target: Target) -> Case:
    total = sum(lengths)

    def make(seed: int, device: str) -> Call:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(total, HEADS, WIDTH, generator=generator).to(device, dtype) for _ in range(4)]
        leaves = tuple(one.requires_grad_() for one in drawn[:3])
        boundaries = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
        return Call((*leaves, boundaries), leaves, (drawn[3],))

    longest = max(lengths)

    lengths_known: dict[str, Any] = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    size = torch.empty(0, dtype=dtype).element_size()
    squares = sum(length**2 for length in lengths)
    return Case(
        op="varlen_attention",
        shape=f"{label}, {HEADS} heads of {WIDTH}",
        dtype=dtype,
        make=make,
        contenders=[Contender(OURS, partial(varlen_attention, **lengths_known)), *baselines(lengths, dtype)],
        exact=exact_by(reference.varlen_attention),
        facts=partial(facts, **lengths_known),
        # Seven products: two in forward; the scores again and four gradients in backward.
        flops=14.0 * squares * HEADS * WIDTH,
        bytes=float(12 * total * HEADS * WIDTH * size),
        limit="gemm",
        target=target,
        # The output, and the statistics of each query and head.
        saved=total * HEADS * WIDTH * size + STATISTICS * total * HEADS * 4,
        counted=12.0 * squares * HEADS * WIDTH,
        notes=("torch.nn.attention.varlen has no CPU kernel, and flex_attention no backward there",),
    )


def cases(quick: bool) -> list[Case]:
    repeats = 3 if quick else 11
    lengths, label = [197, 40, 237] * repeats, f"packed 197, 40 and 237 tokens x {repeats}"
    return [
        case(lengths, label, torch.float32, Target(speedup=1.5)),
        case(lengths, label, torch.bfloat16, Target(speedup=3.0)),
    ]
