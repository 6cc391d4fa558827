"""masked_gather in plain PyTorch: the kept rows alone are read, and gradients are summed in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.ops.portable import add_rows


def samples_of(kept: Tensor, cu_seqlens: Tensor | None, samples: int) -> Tensor:
    """Return the sample of each kept token: (B, 1) for kept (B, K), (T,) for the flat kept (T,) of `cu_seqlens`."""
    if cu_seqlens is None:
        return torch.arange(samples, device=kept.device).unsqueeze(1)
    index = torch.arange(kept.shape[0], device=kept.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)


def _places(kept: Tensor, sample: Tensor, cu_seqlens: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Return the packed places of the kept rows (T,), and those of each sample's prefix (B, P)."""
    # Row t of sample b moves to t + (b + 1) P, behind the prefix rows of the samples up to its own.
    rows = torch.arange(kept.shape[0], device=kept.device) + (sample + 1) * prefix
    first = cu_seqlens[:-1] + prefix * torch.arange(cu_seqlens.shape[0] - 1, device=kept.device)
    return rows, first.unsqueeze(1) + torch.arange(prefix, device=kept.device)


def forward(
    tokens: Tensor, kept: Tensor, positions: Tensor | None, prefix: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Return the prefix and the kept rows of each sample, with their positions."""
    kept = kept.contiguous()  # the result of an index has the index's order of strides
    sample = samples_of(kept, cu_seqlens, tokens.shape[0])
    rows = tokens[sample, kept].contiguous()
    if positions is not None:
        rows += positions[kept]
    if prefix is None:
        return rows
    if cu_seqlens is None:
        return torch.cat([prefix.expand(tokens.shape[0], -1, -1), rows], dim=1)
    out = rows.new_empty(rows.shape[0] + tokens.shape[0] * prefix.shape[0], rows.shape[1])
    of_rows, of_prefix = _places(kept, sample, cu_seqlens, prefix.shape[0])
    out[of_rows] = rows
    out[of_prefix] = prefix
    return out


def backward(
    grad: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    samples: int,
    tokens: int,
    prefix: int,
    need_tokens: bool,
    need_positions: bool,
    need_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of tokens, positions and prefix; empty where not needed."""
    wide, width = statistics_dtype(grad), grad.shape[-1]
    sample = samples_of(kept, cu_seqlens, samples)
    if cu_seqlens is None:
        of_prefix, rows = grad[:, :prefix], grad[:, prefix:]
    else:
        row_places, prefix_places = _places(kept, sample, cu_seqlens, prefix)
        of_prefix, rows = grad[prefix_places], grad[row_places]
    to_tokens, to_positions, to_prefix = (grad.new_empty(0) for _ in range(3))
    if need_tokens or need_positions:
        flat, rows = kept.flatten(), rows.reshape(kept.numel(), width).to(wide)
    if need_tokens:
        sums = rows.new_zeros(samples * tokens, width)
        add_rows(sums, (sample * tokens + kept).flatten(), rows)
        to_tokens = sums.to(grad.dtype).view(samples, tokens, width)
    if need_positions:
        sums = rows.new_zeros(tokens, width)
        add_rows(sums, flat, rows)
        to_positions = sums.to(grad.dtype)
    if need_prefix:
        to_prefix = of_prefix.sum(0, dtype=wide).to(grad.dtype)
    return to_tokens, to_positions, to_prefix
