"""Patch masks of the masked objectives, random or block-wise, and cu_seqlens of what they leave visible.

Every decision is an integer comparison on Philox draws keyed by (seed, step, sample), never by rank or device. One
process and many, the CPU and a GPU, a run and its resumption therefore draw the same masks. Masks of samples that lie
on a GPU are drawn there by a Triton kernel, cell for cell those of the reference implementation. No call waits for the
device, except for block-wise masks on a GPU without Triton.

No floating-point number is used, so the reference implementation is here and in `oner_fast.block_masks`, not in
`oner_fast.ops.reference`, which is the float64 oracle of the other ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from oner_fast.block_masks import MAX_CELLS, MAX_SIDE, pick_blocks
from oner_fast.ops import batching, checks
from oner_fast.ops.implementations import Facts, register
from oner_fast.ops.library import on_gpu_of, why_not_triton
from oner_fast.ops.serve import serve
from oner_fast.ops.transforms import inside_transform
from oner_fast.ops.values import inside_vmap
from oner_fast.philox import MASK_BLOCK, MASK_PATCH, check_step, mask_stream, random_u32, split_seed

Pattern = Literal["random", "block", "reversed_block"]

_OP = "patch_masks"
_LAUNCHING = ("triton",)  # its kernels are launched from Python, and a fake tensor has no memory to launch them on
_MOST_CELLS = 1 << 31  # a 32-bit draw times the number of cells must fit an int64
_TRITON_CELLS = 1 << 14  # one program holds all cells of a sample


class PatchMasks(NamedTuple):
    """The masked cells and the visible cells of each sample.

    `mask` is (B, cells) bool, True where masked. `kept` is (B, cells - masked) int64, the other cells in increasing
    order.
    """

    mask: Tensor
    kept: Tensor


def facts(samples: Tensor, cells: int = 0) -> Facts:
    """Return the facts of a call for these samples and a grid of `cells` cells; nothing is computed."""
    return _OP, samples.device.type, {"cells": cells}


def draw_masks(
    seed: int,
    step: int | Tensor,
    samples: Tensor,
    grid: tuple[int, int],
    masked: int,
    pattern: Pattern = "random",
    stream: int = 0,
    *,
    implementation: str | None = None,
) -> PatchMasks:
    """Draw a mask of exactly `masked` cells for each sample, on the device of `samples`.

    Args:
        seed: the seed of the training, in [0, 2^64).
        step: a number in [0, 2^32), or a 0-d int64 tensor on the device of `samples`. With a tensor, a captured CUDA
            graph draws the masks of the step that the tensor holds at each replay.
        samples: (B,) int64, the places in the global batch.
        grid: the height and width of the image in patches.
        masked: the number of cells to mask.
        pattern: "random" is uniform over all masks of that count. "block" masks blocks (BEiT). "reversed_block" leaves
            blocks visible and masks the rest (UTA). See `oner_fast.block_masks`.
        stream: the index of the masking pass, 0 to 11. Each pass draws its own masks.
        implementation: "reference" or "triton", to force one. All draw the same masks.

    Returns:
        The masks (B, height * width) bool and the visible cells (B, height * width - masked) int64.

    Raises:
        ValueError: a count, grid, pattern, stream, step or seed is out of range, or the implementation is unknown.
        RuntimeError: the forced implementation cannot run here.
    """
    checks.masks("draw_masks", samples, step, ("seed", seed), ("masked", masked), ("stream", stream))
    if not isinstance(pattern, str):
        raise TypeError(f"draw_masks: pattern must be a name, got {type(pattern).__name__}")
    if pattern not in get_args(Pattern):
        raise ValueError(f"pattern must be one of {', '.join(get_args(Pattern))}, not {pattern!r}")
    height, width = _sides(grid)
    cells = height * width
    _check_count(masked, cells)
    if pattern != "random" and (cells > MAX_CELLS or max(grid) > MAX_SIDE):
        raise ValueError(
            f"blocks need a grid of at most {MAX_CELLS} cells and {MAX_SIDE} a side, not {height} x {width}"
        )
    own_stream = mask_stream(MASK_PATCH if pattern == "random" else MASK_BLOCK, stream)
    check_step(step)
    reading = _LAUNCHING if pattern == "random" else (*_LAUNCHING, "reference")
    draw = serve(facts(samples, cells), implementation, samples, _shapes, reading)
    if inside_transform():
        return PatchMasks(*_Batched.apply(samples, step, draw, seed, own_stream, grid, masked, pattern))
    masks: PatchMasks = draw(seed, own_stream, step, samples, grid, masked, pattern)
    return masks


def patch_mask(
    seed: int,
    step: int | Tensor,
    samples: Tensor,
    cells: int,
    masked: int,
    stream: int = 0,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Draw uniform masks without the list of visible cells, on the device of `samples`.

    The masked cells are the `masked` smallest of the pairs (32-bit draw, cell).

    Args:
        seed: the seed of the training, in [0, 2^64).
        step: a number in [0, 2^32), or a 0-d int64 tensor on the device of `samples`.
        samples: (B,) int64, the places in the global batch.
        cells: the number of patches of an image.
        masked: the number of cells to mask.
        stream: the index of the masking pass, 0 to 11.
        implementation: "reference" or "triton", to force one.

    Returns:
        (B, cells) bool with exactly `masked` True in each row.

    Raises:
        ValueError: a count, stream, step or seed is out of range, or the implementation is unknown.
        RuntimeError: the forced implementation cannot run here.
    """
    given = ("seed", seed), ("cells", cells), ("masked", masked), ("stream", stream)
    checks.masks("patch_mask", samples, step, *given)
    _check_count(masked, cells)
    own_stream = mask_stream(MASK_PATCH, stream)
    check_step(step)
    draw = serve(facts(samples, cells), implementation, samples, _shapes, _LAUNCHING)
    if draw is _reference_masks:
        draw = _reference_mask
    if inside_transform():
        batched: Tensor = _Batched.apply(samples, step, draw, seed, own_stream, (1, cells), masked, "random")[0]
        return batched
    mask: Tensor = draw(seed, own_stream, step, samples, (1, cells), masked, "random")[0]
    return mask


def boundaries(counts: Tensor, *, implementation: str | None = None) -> Tensor:
    """Turn numbers of rows into cu_seqlens, on the device of `counts`.

    Args:
        counts: (B,) int32 or int64, the rows of each sample.
        implementation: "reference" or "triton", to force one.

    Returns:
        (B + 1,) int32, beginning with 0 and ending with the sum of `counts`.

    Raises:
        ValueError: a count is negative, their sum exceeds int32, or the implementation is unknown. Counts on CUDA are
            read only with `ONER_FAST_DEBUG=1`.
        RuntimeError: the forced implementation cannot run here.
    """
    checks.counts("boundaries", counts)
    draw = serve(facts(counts), implementation, counts, _shapes, _LAUNCHING)
    return _triton_boundaries(counts) if draw is _triton_masks and not inside_vmap() else _reference_boundaries(counts)


def _sides(grid: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"draw_masks: grid must be a pair (height, width), got {grid!r}")
    height, width = grid
    checks.whole("draw_masks", "the height of grid", height)
    checks.whole("draw_masks", "the width of grid", width)
    return height, width


def _check_count(masked: int, cells: int) -> None:
    if cells > _MOST_CELLS:
        raise ValueError(f"masks have at most 2^31 cells, not {cells}")
    if not 0 <= masked <= cells:
        raise ValueError(f"masked must be in [0, cells = {cells}], not {masked}")


def _reference_masks(
    seed: int, stream: int, step: int | Tensor, samples: Tensor, grid: tuple[int, int], masked: int, pattern: Pattern
) -> PatchMasks:
    cells = grid[0] * grid[1]
    if pattern == "random":
        mask = _random_mask(seed, stream, step, samples, cells, masked)
    else:
        reverse = pattern == "reversed_block"
        picked = pick_blocks(seed, stream, step, samples, grid, cells - masked if reverse else masked)
        mask = picked.flatten(1).logical_not() if reverse else picked.flatten(1)
    return PatchMasks(mask, mask.to(torch.uint8).argsort(dim=1, stable=True)[:, : cells - masked].contiguous())


def _reference_mask(
    seed: int, stream: int, step: int | Tensor, samples: Tensor, grid: tuple[int, int], masked: int, pattern: Pattern
) -> tuple[Tensor]:
    return (_random_mask(seed, stream, step, samples, grid[0] * grid[1], masked),)


def _shapes(
    seed: int, stream: int, step: int | Tensor, samples: Tensor, grid: tuple[int, int], masked: int, pattern: Pattern
) -> PatchMasks:
    """Make the tensors that masks would have; blocks are drawn in a loop that reads values, and there are none."""
    rows, cells = samples.shape[0], grid[0] * grid[1]
    return PatchMasks(samples.new_empty((rows, cells), dtype=torch.bool), samples.new_empty((rows, cells - masked)))


class _Batched(torch.autograd.Function):
    """Draw masks under `torch.vmap`: a batch of samples is drawn as further samples, a batch of steps one by one."""

    @staticmethod
    def forward(  # type: ignore[override]
        samples: Tensor, step: int | Tensor, draw: Callable[..., tuple[Tensor, ...]], seed: int, stream: int, *rest: Any
    ) -> tuple[Tensor, ...]:
        return tuple(draw(seed, stream, step, samples, *rest))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(  # type: ignore[override]
        info: Any, in_dims: batching.Dims, samples: Tensor, step: int | Tensor, *rest: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        own = isinstance(in_dims[0], int)
        rows = samples.movedim(in_dims[0], 0) if isinstance(in_dims[0], int) else samples
        if size == 0:
            _, seed, stream, *options = rest
            one = rows.new_empty(rows.shape[1:]) if own else rows
            found = tuple(x.new_empty((0, *x.shape)) for x in _shapes(seed, stream, 0, one, *options))
        elif isinstance(in_dims[1], int) and isinstance(step, Tensor):
            each = [_Batched.apply(rows[i] if own else rows, step[i], *rest) for i in range(size)]
            found = tuple(torch.stack(column) for column in zip(*each, strict=True))
        else:
            found = tuple(
                batching.elements(x, size) for x in _Batched.apply(batching.rows(rows, own, size), step, *rest)
            )
        return found, (0,) * len(found)


def _random_mask(seed: int, stream: int, step: int | Tensor, samples: Tensor, cells: int, masked: int) -> Tensor:
    draws = random_u32(seed, stream, step, samples, cells)
    if masked == 0:
        return torch.zeros_like(draws, dtype=torch.bool)
    keys = draws * cells + torch.arange(cells, device=draws.device)  # distinct, so the threshold is exact
    threshold = keys.sort(dim=1).values[:, masked - 1 : masked]
    return keys <= threshold


def _reference_boundaries(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _triton_masks(
    seed: int, stream: int, step: int | Tensor, samples: Tensor, grid: tuple[int, int], masked: int, pattern: Pattern
) -> PatchMasks:
    from oner_fast.kernels import patch_masks as kernels

    with on_gpu_of(samples):
        return PatchMasks(*kernels.draw_masks(split_seed(seed), stream, step, samples, grid, masked, pattern))


def _triton_boundaries(counts: Tensor) -> Tensor:
    from oner_fast.kernels import patch_masks as kernels

    with on_gpu_of(counts):
        return kernels.boundaries(counts)


def _why_not_triton(device: str, cells: int = 0, **facts: Any) -> list[str]:
    found = why_not_triton(device)
    if cells > _TRITON_CELLS:
        found.append(f"takes grids of at most {_TRITON_CELLS} cells, not {cells}")
    return found


register(_OP, "reference", _reference_masks)
register(
    _OP, "triton", _triton_masks, devices=("cuda",), on_request=("cpu",), preference=50, reasons=_why_not_triton,
)  # fmt: skip
