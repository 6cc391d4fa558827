"""gather_patches: half of the patches of uint8 images, normalised. uint8 takes no gradient, so forward alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.benchmarks.cases import OURS, Call, Case, Contender, Target, both, exact_by
from oner_fast.benchmarks.ops.masked_gather import random_kept
from oner_fast.ops import gather_patches, reference
from oner_fast.ops.gather_patches import facts

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _affine(images: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Write (x / 255 - mean) / std as x * scale + shift, (C, 1, 1) each."""
    mean = torch.tensor(MEAN, dtype=dtype, device=images.device).view(-1, 1, 1)
    std = torch.tensor(STD, dtype=dtype, device=images.device).view(-1, 1, 1)
    return 1 / (255 * std), -mean / std


def normalise_then_gather(images: Tensor, kept: Tensor, patch: int, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise and unfold all pixels, then keep half of the patches, as a data loader and a tower do together."""
    patches = F.unfold(images.float() * scale + shift, patch, stride=patch).transpose(1, 2)
    return patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))


def view_then_gather(images: Tensor, kept: Tensor, patch: int, scale: Tensor, shift: Tensor) -> Tensor:
    """Reshape bytes to patches instead of unfolding, keep some, and normalise only those."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    patches = images.view(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(batch, rows * columns, channels * patch * patch)
    visible = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    visible = visible.view(batch, -1, channels, patch, patch)
    return (visible * scale + shift).flatten(2)


def index_the_view(images: Tensor, kept: Tensor, patch: int, scale: Tensor, shift: Tensor) -> Tensor:
    """Read only the kept patches, by indexing a strided view of the images."""
    batch, channels, height, width = images.shape
    columns = width // patch
    view = images.view(batch, channels, height // patch, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    sample = torch.arange(batch, device=images.device).unsqueeze(1)
    visible = view[sample, kept // columns, kept % columns]  # [B, K, C, P, P]
    return (visible * scale + shift).flatten(2)


def with_constants(call: Call) -> Call:
    """Make the normalisation one multiplication and one addition, with constants computed beforehand."""
    images, kept, patch, *_ = call.arguments
    return Call((images, kept, patch, *_affine(images, torch.float32)))


def case(batch: int, side: int, patch: int, share: float, target: Target) -> Case:
    count = (side // patch) ** 2
    kept = int(count * share)

    def make(seed: int, device: str) -> Call:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8).to(device)
        return Call((images, random_kept(batch, count, kept, generator).to(device), patch, MEAN, STD))

    def in_float64(images: Tensor, kept: Tensor, patch: int, mean: object, std: object) -> Tensor:
        result = reference.gather_patches(images, kept, patch, MEAN, STD, torch.float64)
        assert isinstance(result, Tensor)
        return result

    pixels = batch * kept * 3 * patch * patch
    return Case(
        op="gather_patches",
        shape=f"{batch} x 3 x {side} x {side} uint8, patch {patch}, keep {kept} of {count}",
        dtype=torch.float32,
        make=make,
        contenders=[
            Contender(OURS, gather_patches),
            *both("normalise, unfold, gather", normalise_then_gather, quick=("eager",), layout=with_constants),
            *both("reshape, gather, normalise", view_then_gather, layout=with_constants),
            *both("index, normalise", index_the_view, layout=with_constants),
        ],
        exact=exact_by(in_float64),
        facts=facts,
        flops=2.0 * pixels,
        bytes=float(pixels + 4 * pixels + batch * kept * 8),
        limit="copy",
        target=target,
        notes=("bytes take no gradient: forward alone",),
    )


def cases(quick: bool) -> list[Case]:
    target = Target(speedup=1.5, eager=10.0)
    return [case(16 if quick else 64, 224, 16, 0.5, target)]
