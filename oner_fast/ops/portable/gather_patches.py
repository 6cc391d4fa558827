"""gather_patches in plain PyTorch: the kept patches alone are read and normalised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oner_fast.ops.portable import add_rows
from oner_fast.ops.portable.masked_gather import samples_of


def forward(
    images: Tensor,
    kept: Tensor,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Return the kept patches, normalised and flattened."""
    kept = kept.contiguous()  # the result of an index has the index's order of strides
    cells = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # [B, C, rows, columns, p, p]
    row, column = kept // max(cells.shape[3], 1), kept % max(cells.shape[3], 1)
    wide = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    patches = cells[samples_of(kept, cu_seqlens, images.shape[0]), :, row, column].to(wide)  # [..., C, p, p]
    if images.dtype == torch.uint8:
        patches /= 255
    for values, apply in ((mean, patches.sub_), (std, patches.div_)):
        if values is not None:
            apply(values.to(wide).view(-1, 1, 1))
    return patches.to(dtype).flatten(-3).contiguous()


def backward(
    grad: Tensor,
    kept: Tensor,
    patch_size: int,
    std: Tensor | None,
    image_shape: Sequence[int],
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Return the gradient of the images, 0 where no patch was kept."""
    samples, channels, height, width = image_shape
    down, across = height // patch_size, width // patch_size
    wide = torch.float64 if torch.float64 in (grad.dtype, dtype) else torch.float32
    patches = grad.reshape(-1, channels, patch_size, patch_size).to(wide)
    if std is not None:
        patches = patches / std.to(wide).view(-1, 1, 1)
    sums = patches.new_zeros(samples * down * across, channels, patch_size, patch_size)
    index = samples_of(kept, cu_seqlens, samples) * (down * across) + kept
    add_rows(sums, index.flatten(), patches)
    out = torch.zeros(tuple(image_shape), dtype=dtype, device=grad.device)
    placed = sums.view(samples, down, across, channels, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    out[:, :, : down * patch_size, : across * patch_size] = placed.reshape(
        samples, channels, down * patch_size, across * patch_size
    )
    return out
