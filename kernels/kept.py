"""Work on the gathers' `kept` on the device: find the sample of a packed row, and the entries that chose each cell.

A gradient has to find, for every (sample, cell), the entries of `kept` that chose it, in any order and any number. Two
int32 arrays hold them as linked lists: `head` (B, N) is the first entry of a cell or -1, and `following` (T) the next
entry of the same cell or -1, both counted within the sample. From the head on, entries come in ascending order, so that
sums have one order and need no atomics. The lists cost (N + K) K comparisons for each sample, 8 K bytes read and
4 (N + K) written: half a percent of the gradient's bytes for N = 196, K = 98, D = 768 in bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels.launch import Compilation, architecture_of, configuration


@triton.jit
def sample_of_row(cu_seqlens, row, samples, steps, prefix):
    """Find the last sample whose first row, cu_seqlens[b] + b * prefix, is not after `row`; always in [0, samples)."""
    low = (row * 0).to(tl.int32)
    high = low + samples
    for _ in range(steps):  # 2^steps >= samples
        middle = (low + high) // 2
        begins = tl.load(cu_seqlens + middle).to(tl.int64) + middle.to(tl.int64) * prefix
        low = tl.where(begins <= row, middle, low)
        high = tl.where(begins <= row, high, middle)
    return low


@triton.jit(do_not_specialize=["per_sample", "total", "cells"])
def lists_kernel(kept, cu_seqlens, head, following, per_sample, total, cells, BLOCK_I: tl.constexpr):
    """Build the lists of a sample: each cell looks for its first entry, each entry for the next of the same cell."""
    sample = tl.program_id(0).to(tl.int64)
    if cu_seqlens is None:
        begin, count = sample * per_sample, per_sample
    else:
        begin = tl.load(cu_seqlens + sample).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), total)
        until = tl.minimum(tl.load(cu_seqlens + sample + 1).to(tl.int64), total)
        count = tl.maximum(until - begin, 0).to(tl.int32)
    for start in range(tl.program_id(1) * BLOCK_I, cells + count, tl.num_programs(1) * BLOCK_I):
        item = start + tl.arange(0, BLOCK_I)  # [BLOCK_I]
        is_cell = item < cells
        is_entry = (item >= cells) & (item < cells + count)
        own = begin + item - cells
        cell = tl.where(is_cell, item, tl.load(kept + own, mask=is_entry, other=-1))
        after = tl.where(is_cell, -1, item - cells)
        found = tl.full([BLOCK_I], -1, tl.int32)
        for back in range(count):  # from the last entry to the first, so that the first match is found last
            entry = count - 1 - back
            matches = (tl.load(kept + begin + entry) == cell) & (entry > after)
            found = tl.where(matches, entry, found)
        tl.store(head + sample * cells + item, found, mask=is_cell)
        tl.store(following + own, found, mask=is_entry)


@triton.jit
def next_entry(following, begin, entry, total):
    """Return the next entry of the same cell, or -1; lists end even where overlapping boundaries corrupted them."""
    after = tl.load(following + begin + entry, entry >= 0, -1)
    return tl.where((after > entry) & (begin + after < total), after, -1)


def lists(kept: Tensor, cu_seqlens: Tensor | None, samples: int, cells: int) -> tuple[Tensor, Tensor]:
    """Build `head` (B, N) and `following` (T) for a contiguous `kept`, on its device."""
    head = torch.empty(samples, cells, dtype=torch.int32, device=kept.device)
    following = torch.empty(kept.numel(), dtype=torch.int32, device=kept.device)
    if samples and cells:
        chosen = configuration("masked_gather", "lists", "any", architecture_of(kept))
        each = triton.cdiv(kept.numel(), samples)  # the mean; longer samples are looped over
        blocks = triton.cdiv(cells + each, chosen.blocks["BLOCK_I"])
        lists_kernel[(samples, min(blocks, 65535))](
            kept, cu_seqlens, head, following, each, kept.numel(), cells, **chosen.launch
        )
    return head, following


def search_steps(samples: int) -> int:
    """Return the number of bisection steps that find one of `samples` samples."""
    return max(samples - 1, 0).bit_length()


def compilations() -> list[Compilation]:
    """List the kernel for fixed and for ragged samples."""
    chosen = configuration("masked_gather", "lists", "any", 80)
    signature = {
        "kept": "*i64",
        "head": "*i32",
        "following": "*i32",
        "per_sample": "i32",
        "total": "i32",
        "cells": "i32",
    }
    return [
        Compilation(
            "kept_lists_fixed", lists_kernel, signature, {"cu_seqlens": None, **chosen.blocks}, options=chosen.options
        ),
        Compilation(
            "kept_lists_ragged",
            lists_kernel,
            {**signature, "cu_seqlens": "*i32"},
            chosen.blocks,
            options=chosen.options,
        ),
    ]
