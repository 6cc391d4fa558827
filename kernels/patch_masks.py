"""Patch masks in Triton: one program for each sample, in integer arithmetic, equal to the reference cell for cell.

A random mask is the `count` smallest of the pairs (draw, cell). Their threshold is found bit by bit, from the highest
of 32, by counting the draws below it: 32 sums over the cells instead of a sort. Blocks are tried one after the other;
an attempt is one Philox block and five sums. For each sample 8 bytes are read and `cells` + 8 K written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast import block_masks
from oner_fast.kernels.launch import Compilation, Configuration, architecture_of, configuration
from oner_fast.kernels.philox import philox4x32

_ASPECTS = tl.constexpr(block_masks.ASPECTS)
_PARTS = tl.constexpr(len(block_masks.ASPECTS))
_MIN_AREA = tl.constexpr(block_masks.MIN_AREA)
_ATTEMPTS = tl.constexpr(block_masks.ATTEMPTS)
_PADDING = tl.constexpr(block_masks.PADDING)


@triton.jit
def smallest(draws, free, count):
    """Mark the `count` smallest pairs (draw, place) among the `free`: [BLOCK] bool."""
    threshold = draws.to(tl.int64) * 0
    threshold = tl.max(threshold, 0).to(tl.uint32)
    bit = threshold + 0x80000000
    for _ in range(32):  # the largest threshold that has fewer than `count` below it: the count-th smallest draw
        below = tl.sum((free & (draws < (threshold | bit))).to(tl.int32), 0)
        threshold = tl.where(below < count, threshold | bit, threshold)
        bit = bit >> 1
    below = free & (draws < threshold)
    equal = (free & (draws == threshold)).to(tl.int32)
    rest = count - tl.sum(below.to(tl.int32), 0)
    return below | ((equal != 0) & (tl.cumsum(equal, 0) <= rest))


@triton.jit(
    do_not_specialize=["step", "stream", "key_low", "key_high", "height", "width", "count", "kept_each", "seen"]
)
def masks_kernel(
    samples, step_at, mask, kept, step, stream, key_low, key_high, height, width, count, kept_each, seen,
    BLOCKS: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_SIDE: tl.constexpr,
):  # fmt: skip
    """Pick `count` cells, in BLOCKS or one by one; they are visible if `seen` is 1, masked if it is 0."""
    program = tl.program_id(0).to(tl.int64)
    sample = tl.load(samples + program).to(tl.uint32)
    if step_at is not None:
        step = tl.load(step_at)
    step, stream = step.to(tl.uint32), stream.to(tl.uint32)
    key_low, key_high = key_low.to(tl.uint32), key_high.to(tl.uint32)
    cells = height * width
    cell = tl.arange(0, BLOCK_CELLS)  # [BLOCK_CELLS]
    real = cell < cells
    free = real
    first_block = sample * 0
    if BLOCKS:
        first_block += _PADDING
        part = tl.arange(0, _PARTS)
        aspects = part * 0
        for k in tl.static_range(_PARTS):
            aspects = tl.where(part == k, _ASPECTS[k], aspects)
        odd = 2 * tl.arange(0, BLOCK_SIDE) + 1
        thresholds = odd * odd * 1024  # [BLOCK_SIDE]
        row, column = cell // width, cell % width
        attempt = sample * 0
        failures = 0
        while (count > 0) & (failures < _ATTEMPTS):
            word0, word1, word2, word3 = philox4x32(attempt, sample, step, stream, key_low, key_high)
            low, high = tl.minimum(count, _MIN_AREA), tl.maximum(count, _MIN_AREA)
            area = low + tl.umulhi(word0, (high - low + 1).to(tl.uint32)).to(tl.int32)
            chosen = tl.umulhi(word1, attempt * 0 + _PARTS).to(tl.int32)
            tall = area * tl.sum(tl.where(part == chosen, aspects, 0), 0)
            wide = area * tl.sum(tl.where(part + chosen == _PARTS - 1, aspects, 0), 0)
            block_height = tl.sum((thresholds <= tall).to(tl.int32), 0)
            block_width = tl.sum((thresholds <= wide).to(tl.int32), 0)
            top = tl.umulhi(word2, (height - block_height + 1).to(tl.uint32)).to(tl.int32)
            left = tl.umulhi(word3, (width - block_width + 1).to(tl.uint32)).to(tl.int32)
            inside = (row >= top) & (row < top + block_height) & (column >= left) & (column < left + block_width)
            added = tl.sum((inside & free).to(tl.int32), 0)
            taken = (block_height < height) & (block_width < width) & (added >= 1) & (added <= count)
            free = free & ~(inside & taken)
            count -= tl.where(taken, added, 0)
            failures = tl.where(taken, 0, failures + 1)
            attempt += 1
    block = first_block + tl.arange(0, BLOCK_CELLS // 4).to(tl.uint32)
    word0, word1, word2, word3 = philox4x32(block, sample, step, stream, key_low, key_high)
    draws = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))  # [BLOCK_CELLS]
    picked = (real & ~free) | smallest(draws, free, count)
    visible = (picked.to(tl.int32) == seen) & real
    tl.store(mask + program * cells + cell, (~visible).to(tl.uint8), real)
    place = tl.cumsum(visible.to(tl.int32), 0) - 1
    tl.store(kept + program * kept_each + place, cell.to(tl.int64), visible)


@triton.jit(do_not_specialize=["samples"])
def boundaries_kernel(counts, out, samples, BLOCK: tl.constexpr):
    """Store out[b + 1] = counts[0] + ... + counts[b], in one program."""
    total = tl.zeros([1], tl.int32)
    tl.store(out + tl.arange(0, 1), total)
    for start in range(0, samples, BLOCK):
        sample = start + tl.arange(0, BLOCK)  # [BLOCK]
        count = tl.load(counts + sample, sample < samples, 0).to(tl.int32)
        tl.store(out + 1 + sample, total + tl.cumsum(count, 0), sample < samples)
        total += tl.sum(count, 0)


def draw_masks(
    key: tuple[int, int],
    stream: int,
    step: int | Tensor,
    samples: Tensor,
    grid: tuple[int, int],
    masked: int,
    pattern: str,
) -> tuple[Tensor, Tensor]:
    """Draw mask (B, cells) bool and kept (B, cells - masked) int64; `key` is the two words of the seed."""
    height, width = grid
    cells = height * width
    mask = torch.empty(len(samples), cells, dtype=torch.bool, device=samples.device)
    kept = torch.empty(len(samples), cells - masked, dtype=torch.int64, device=samples.device)
    if mask.numel() == 0:
        return mask, kept
    chosen = _of_cells(cells, architecture_of(samples))
    on_device, reverse = isinstance(step, Tensor), pattern == "reversed_block"
    masks_kernel[(len(samples),)](
        samples.contiguous(), step if on_device else None, mask.view(torch.uint8), kept,
        0 if on_device else _signed(step), stream, *map(_signed, key), height, width,
        cells - masked if reverse else masked, cells - masked, int(reverse), BLOCKS=pattern != "random",
        BLOCK_CELLS=max(triton.next_power_of_2(cells), 4), BLOCK_SIDE=triton.next_power_of_2(max(grid)),
        **chosen.options,
    )  # fmt: skip
    return mask, kept


def boundaries(counts: Tensor) -> Tensor:
    """Return cu_seqlens (B + 1,) int32 for counts (B,)."""
    out = torch.empty(len(counts) + 1, dtype=torch.int32, device=counts.device)
    chosen = configuration("patch_masks", "boundaries", "any", architecture_of(counts))
    boundaries_kernel[(1,)](counts.contiguous(), out, len(counts), **chosen.launch)
    return out


def _of_cells(cells: int, architecture: int) -> Configuration:
    size = "256 cells" if cells <= 256 else "1024 cells" if cells <= 1024 else "more cells"
    return configuration("patch_masks", "masks", size, architecture)


def _signed(word: int | Tensor) -> int:
    """Return the int32 with the bits of a uint32, so that every launch has arguments of one type."""
    assert isinstance(word, int)
    return word - (1 << 32) if word >> 31 else word


def compilations() -> list[Compilation]:
    """List the kernels for grids of three sizes, with the step as a number and on the device."""
    made = []
    integers = ["step", "stream", "key_low", "key_high", "height", "width", "count", "kept_each", "seen"]
    signature = {"samples": "*i64", "mask": "*u8", "kept": "*i64", **dict.fromkeys(integers, "i32")}
    for pattern, blocks in (("random", False), ("block", True)):
        for cells, side in ((256, 16), (1024, 32), (4096, 64)):
            tile = {"BLOCKS": blocks, "BLOCK_CELLS": cells, "BLOCK_SIDE": side}
            name, options = f"masks_{pattern}_{cells}", _of_cells(cells, 80).options
            made.append(Compilation(name, masks_kernel, signature, {**tile, "step_at": None}, options=options))
        captured = {**signature, "step_at": "*i64"}
        made.append(Compilation(f"{name}_step_on_device", masks_kernel, captured, tile, options=options))
    chosen = configuration("patch_masks", "boundaries", "any", 80)
    signature = {"counts": "*i64", "out": "*i32", "samples": "i32"}
    made.append(Compilation("boundaries", boundaries_kernel, signature, chosen.blocks, options=chosen.options))
    return made
