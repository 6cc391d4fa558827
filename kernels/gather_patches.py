"""gather_patches in Triton: bound by memory; a pixel takes a subtraction and a product, a gradient a division.

The kernels work on lines of patches: `patch_size` numbers that lie side by side in the image and in the result. Bytes,
for T kept patches of C P^2 numbers: forward reads the numbers once in the images' type, writes them once in the
result's, and reads 8 T bytes of indices. (A line of 16 uint8 is half a 32-byte sector; where its neighbour is not kept,
the other half is read for nothing.) Backward reads the T C P^2 numbers of the gradient. It writes the whole gradient of
the images once, zeros included. It moves 16 T + 8 B N bytes of indices and their table (`kernels.kept`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from oner_fast.kernels import kept as kept_lists
from oner_fast.kernels.kept import sample_of_row, search_steps
from oner_fast.kernels.launch import Compilation, architecture_of, configuration, triton_type


@triton.jit(do_not_specialize=["entries", "samples", "per_sample", "cells", "across", "steps"])
def forward_kernel(
    images, kept, mean, std, cu_seqlens, out,
    entries, samples, per_sample, cells, across, steps, stride_b, stride_c, stride_h, stride_w,
    PATCH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Copy kept patches; programs: (block of lines of kept patches; channel; block of columns of a line)."""
    channel = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BLOCK_L
    local = (first % PATCH).to(tl.int32) + tl.arange(0, BLOCK_L)  # [BLOCK_L]
    line = local % PATCH
    entry = first // PATCH + local // PATCH
    column = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    there = entry < entries
    cell = tl.load(kept + entry, there, -1)
    real = there & (cell >= 0) & (cell < cells)
    cell = cell.to(tl.int32)
    if cu_seqlens is None:
        start = first // PATCH
        sample = start // per_sample + ((start % per_sample).to(tl.int32) + local // PATCH) // per_sample
    else:
        sample = sample_of_row(cu_seqlens, entry, samples, steps, 0).to(tl.int64)
    corner = sample * stride_b + channel.to(tl.int64) * stride_c
    y, x = (cell // across * PATCH + line).to(tl.int64), (cell % across * PATCH).to(tl.int64)
    source = (corner + y * stride_h + x * stride_w)[:, None] + column.to(tl.int64)[None, :] * stride_w
    inside = (column < PATCH)[None, :]
    pixels = tl.load(images + source, real[:, None] & inside, 0)  # [BLOCK_L, BLOCK_P]
    if images.dtype.element_ty == tl.float64 or out.dtype.element_ty == tl.float64:
        pixels = pixels.to(tl.float64)
    else:
        pixels = pixels.to(tl.float32)
    # (x / 255 - mean) / std = (x - 255 mean) * (1 / (255 std))
    full: tl.constexpr = 255.0 if images.dtype.element_ty == tl.uint8 else 1.0
    if mean is not None:
        pixels -= (tl.load(mean + channel) * full).to(pixels.dtype)
    if std is not None:
        pixels *= (1.0 / (tl.load(std + channel) * full)).to(pixels.dtype)
    elif full != 1.0:
        pixels *= 1.0 / full
    pixels = tl.where(real[:, None], pixels, float("nan"))  # for values of kept outside the image
    target = (entry * tl.num_programs(1) + channel) * (PATCH * PATCH) + line * PATCH  # [BLOCK_L]
    tl.store(out + target[:, None] + column[None, :], pixels, there[:, None] & inside)


@triton.jit(do_not_specialize=["samples", "entries", "per_sample", "cells", "across", "lines_each"])
def backward_kernel(
    grad, table, lengths, members, std, cu_seqlens, to_images,
    samples, entries, per_sample, cells, across, lines_each, stride_gb, stride_gk, stride_gd,
    SORTED: tl.constexpr, PATCH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the images; lines are in image order: a row of pixels patch by patch, then the next row."""
    channel = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * BLOCK_L
    local = (first % lines_each).to(tl.int32) + tl.arange(0, BLOCK_L)  # [BLOCK_L]
    sample = first // lines_each + local // lines_each
    line = local % lines_each
    column = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    real = sample < samples
    y = line // across
    cell = y // PATCH * across + line % across
    if cu_seqlens is None:
        begin, above = sample * per_sample, sample * stride_gb
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + sample, real, 0), 0), entries).to(tl.int64)
        above = begin * stride_gk
    within = (channel.to(tl.int64) * PATCH + y % PATCH) * PATCH  # [BLOCK_L]
    place = (within[:, None] + column[None, :]) * stride_gd  # [BLOCK_L, BLOCK_P]
    inside = (column < PATCH)[None, :]
    wide: tl.constexpr = (
        tl.float64 if grad.dtype.element_ty == tl.float64 or to_images.dtype.element_ty == tl.float64 else tl.float32
    )
    pair = sample * cells + cell
    found = tl.load(table + pair, real, -1)
    source = grad + (above + found.to(tl.int64) * stride_gk)[:, None] + place
    sums = tl.load(source, (found >= 0)[:, None] & inside, 0.0).to(wide)
    length = tl.load(lengths + pair, found < -1, 0)  # of patches that were kept more than once
    first = (-2 - found).to(tl.int64) if SORTED else begin - 2 - found
    for step in range(tl.max(length, 0)):
        entry = tl.load(members + first + step, (step < length) & (first + step < entries), -1)
        there = (entry >= 0) & (begin + entry < entries)
        source = grad + (above + entry.to(tl.int64) * stride_gk)[:, None] + place
        sums += tl.load(source, there[:, None] & inside, 0.0).to(wide)
    if std is not None:
        sums /= tl.load(std + channel).to(wide)
    target = ((sample * tl.num_programs(1) + channel) * lines_each + line) * PATCH  # [BLOCK_L]
    tl.store(to_images + target[:, None] + column[None, :], sums, real[:, None] & inside)


def forward(
    images: Tensor,
    kept: Tensor,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Launch forward; see the raw op for the shapes."""
    samples, channels, height, width = images.shape
    out = images.new_empty((*kept.shape, channels * patch_size * patch_size), dtype=dtype)
    if out.numel() == 0:
        return out
    entries, across = kept.numel(), width // patch_size
    grid, tile = _tiles(
        "forward", entries * patch_size, channels, patch_size, (images.dtype, dtype), architecture_of(images)
    )
    forward_kernel[grid](
        images, kept.contiguous(), _dense(mean), _dense(std), _dense(cu_seqlens), out,
        entries, samples, 0 if cu_seqlens is not None else kept.shape[1], (height // patch_size) * across, across,
        search_steps(samples), *images.stride(), **tile,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    kept: Tensor,
    patch_size: int,
    std: Tensor | None,
    image_shape: Sequence[int],
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Launch backward: return the gradient of the images, of shape `image_shape` and dtype `dtype`."""
    samples, channels, height, width = image_shape
    to_images = grad.new_empty(image_shape, dtype=dtype)
    if to_images.numel() == 0:
        return to_images
    across = width // patch_size
    cells = (height // patch_size) * across
    kept, cu_seqlens = kept.contiguous(), _dense(cu_seqlens)
    found = kept_lists.lists(kept, cu_seqlens, samples, cells)
    grid, tile = _tiles(
        "backward", samples * height * across, channels, patch_size, (grad.dtype, dtype), architecture_of(grad)
    )
    strides = grad.stride() if cu_seqlens is None else (0, *grad.stride())
    backward_kernel[grid](
        grad, *found[:3], _dense(std), cu_seqlens, to_images,
        samples, kept.numel(), 0 if cu_seqlens is not None else kept.shape[1], cells, across, height * across,
        *strides, SORTED=found.pairs is not None, **tile,
    )  # fmt: skip
    return to_images


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _tiles(
    kernel: str, lines: int, channels: int, patch: int, dtypes: tuple[torch.dtype, torch.dtype], architecture: int
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Return the grid and the shape of a tile, which holds as many whole lines as its pixels allow."""
    chosen = configuration("gather_patches", kernel, "float64" if torch.float64 in dtypes else "others", architecture)
    block_p = min(triton.next_power_of_2(patch), chosen.blocks["BLOCK_P"])
    block_l = chosen.blocks["PIXELS"] // block_p
    grid = (triton.cdiv(lines, block_l), channels, triton.cdiv(patch, block_p))
    return grid, {"PATCH": patch, "BLOCK_L": block_l, "BLOCK_P": block_p, **chosen.options}


_PAIRS = (
    (torch.uint8, torch.bfloat16), (torch.uint8, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32), (torch.float64, torch.float64),
)  # fmt: skip


def compilations() -> list[Compilation]:
    """List both kernels for patches of 14 and 16 pixels, fixed and ragged."""
    return [
        made
        for ragged, patch, pairs in ((False, 14, _PAIRS), (False, 16, _PAIRS), (True, 16, _PAIRS[:3]))
        for pixels, result in pairs
        for made in _compilations(ragged, patch, pixels, result)
    ]


def _compilations(ragged: bool, patch: int, pixels: torch.dtype, result: torch.dtype) -> list[Compilation]:
    """List forward and backward for contiguous images whose sides 16 divides."""
    boundaries: dict[str, str] = {"cu_seqlens": "*i32"} if ragged else {}
    absent: dict[str, int | None] = {} if ragged else {"cu_seqlens": None}
    images, rows = f"*{triton_type(pixels)}", f"*{triton_type(result)}"
    name = f"{images[1:]}_to_{rows[1:]}_patch_{patch}_{'ragged' if ragged else 'fixed'}"

    def integers(names: str) -> dict[str, str]:
        return dict.fromkeys(names.split(), "i32")

    def constants(kernel: str) -> tuple[dict[str, int | None], dict[str, int]]:
        tile = dict(_tiles(kernel, 1, 1, patch, (pixels, result), 80)[1])
        options = {key: tile.pop(key) for key in list(tile) if key.islower()}
        return {**absent, **tile}, options

    constexprs, options = constants("forward")
    made = [
        Compilation(
            f"gather_patches_forward_{name}",
            forward_kernel,
            {
                "images": images, "kept": "*i64", "mean": "*fp64", "std": "*fp64", **boundaries, "out": rows,
                **integers("entries samples per_sample cells across steps stride_b stride_c stride_h"),
            },
            {**constexprs, "stride_w": 1},
            dict.fromkeys(("stride_b", "stride_c", "stride_h"), 16),
            options,
        )
    ]  # fmt: skip
    if pixels != torch.uint8:
        constexprs, options = constants("backward")
        made.append(
            Compilation(
                f"gather_patches_backward_{name}",
                backward_kernel,
                {
                    "grad": rows, **dict.fromkeys(("table", "lengths", "members"), "*i32"), "std": "*fp64",
                    **boundaries, "to_images": images,
                    **integers("samples entries per_sample cells across lines_each stride_gb stride_gk"),
                },
                {**constexprs, "stride_gd": 1, "SORTED": False},
                dict.fromkeys(("stride_gb", "stride_gk"), 16 if patch == 16 else 1),
                options,
            )
        )  # fmt: skip
    return made
