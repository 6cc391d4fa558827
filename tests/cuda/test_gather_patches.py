from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oner_fast.ops import reference

F32, F16, BF16, F64, U8 = torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8
# The pairs of types that are made in words of 16 bytes; any other pair is made number by number.
PAIRS = [(U8, F32), (U8, F16), (U8, BF16), (F32, F32), (F32, F16), (F32, BF16), (F16, F16), (BF16, BF16), (F64, F64)]
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def numbers(values: Any) -> Any:
    return None if values is None else torch.tensor(values, dtype=F64)


def forward(
    lib: Any, images: Tensor, kept: Tensor, patch: int, mean: Any, std: Any, dtype: torch.dtype, cu: Any = None,
    **settings: Any,
) -> Tensor:  # fmt: skip
    batch, channels, height, width = images.shape
    cells = (height // patch) * (width // patch)
    out = lib.poison(*kept.shape, channels * patch * patch, dtype=dtype)
    lib.call("gather_patches", dict(
        images=images, out=out, mean=numbers(mean), std=numbers(std), kept=lib.kept(kept, batch, cells, cu),
        sample_stride=images.stride(0), channel_stride=images.stride(1), line_stride=images.stride(2),
        channels=channels, patch=patch, across=width // patch, image_number=lib.number(images),
        out_number=lib.number(out),
    ), **settings)  # fmt: skip
    return out


def backward(
    lib: Any, grad: Tensor, kept: Tensor, patch: int, std: Any, shape: Any, dtype: torch.dtype, cu: Any = None,
    **settings: Any,
) -> Tensor:  # fmt: skip
    batch, channels, height, width = shape
    cells = (height // patch) * (width // patch)
    out = lib.poison(*shape, dtype=dtype)
    lib.call("gather_patches_backward", dict(
        grad=grad, to_images=out, std=numbers(std), choices=torch.full((batch, cells, 2), 77, dtype=torch.int32),
        kept=lib.kept(kept, batch, cells, cu), channels=channels, patch=patch, across=width // patch,
        down=height // patch, grad_number=lib.number(grad), image_number=lib.number(out),
    ), **settings)  # fmt: skip
    return out


def pictures(dtype: torch.dtype, patch: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(patch)
    shape = (batch, 3, 2 * patch, 3 * patch)
    if dtype == U8:
        return torch.randint(256, shape, generator=generator, dtype=U8)
    return torch.randn(*shape, generator=generator).to(dtype)


def exact_of(images: Tensor, kept: Tensor, patch: int, mean: Any, std: Any, cu: Any = None) -> Tensor:
    wide = images if images.dtype == U8 else images.double()
    out = reference.gather_patches(wide, kept, patch, mean, std, F64, cu_seqlens=cu)
    return out if cu is None else out[0]


def close(ours: Tensor, exact: Tensor) -> None:
    eps = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=eps, atol=16 * min(eps, 1.2e-7))


@pytest.mark.parametrize("images,result", PAIRS)
def test_forward_agrees_with_the_reference(library: Any, images: torch.dtype, result: torch.dtype) -> None:
    lib, pixels = library("gather_patches"), pictures(images, 8)
    kept = torch.tensor([[5, 0, 5], [1, 2, 3]])
    for mean, std in ((MEAN, STD), (None, STD), (MEAN, None), (None, None)):
        ours = forward(lib, pixels, kept, 8, mean, std, result, shuffle=1)
        assert "gather_patches_forward" in lib.log[0].kernel
        close(ours, exact_of(pixels, kept, 8, mean, std))
    if images == result:
        assert torch.equal(ours, reference.gather_patches(pixels, kept, 8))
    cu = torch.tensor([0, 0, 4], dtype=torch.int32)
    flat = torch.tensor([4, 0, 0, 5])
    close(forward(lib, pixels, flat, 8, MEAN, STD, result, cu), exact_of(pixels, flat, 8, MEAN, STD, cu))


@pytest.mark.parametrize("patch", [3, 8])
@pytest.mark.parametrize("images,result", [(F16, F32), (BF16, F16), (U8, F64), (F64, F32), (F32, F32), (U8, BF16)])
def test_forward_number_by_number(library: Any, images: torch.dtype, result: torch.dtype, patch: int) -> None:
    lib, kept = library("gather_patches"), torch.tensor([[5, 0, 5], [1, 2, 3]])
    room = pictures(images, patch)
    pixels = torch.cat([room[..., :1], room], dim=3)[..., 1:]  # no line begins where a word does
    close(forward(lib, pixels, kept, patch, MEAN, STD, result, shuffle=1), exact_of(pixels, kept, patch, MEAN, STD))
    assert "gather_patches_any" in lib.log[0].kernel


@pytest.mark.parametrize("patch", [3, 8])
@pytest.mark.parametrize("grad_dtype,images", [(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (F64, F64)])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradient_agrees_with_the_reference(
    library: Any, grad_dtype: torch.dtype, images: torch.dtype, patch: int, ragged: bool
) -> None:
    lib, pixels = library("gather_patches"), torch.zeros(2, 3, 2 * patch, 3 * patch, dtype=F64, requires_grad=True)
    kept = torch.tensor([[5, 0, 5, 5], [1, 2, 3, 1]])
    cu = torch.tensor([0, 6, 8], dtype=torch.int32) if ragged else None
    kept = kept.flatten() if ragged else kept
    grad = torch.randn(*kept.shape, 3 * patch * patch, generator=torch.Generator().manual_seed(2)).to(grad_dtype)
    (exact,) = torch.autograd.grad(exact_of(pixels, kept, patch, MEAN, STD, cu), pixels, grad.double())
    ours = backward(lib, grad, kept, patch, STD, pixels.shape, images, cu, shuffle=1)
    close(ours, exact)
    assert torch.equal(ours, backward(lib, grad, kept, patch, STD, pixels.shape, images, cu, seed=3, shuffle=2))


@pytest.mark.parametrize("patch", [3, 8])
def test_wrong_indices_touch_nothing_else(library: Any, patch: int) -> None:
    lib, pixels = library("gather_patches"), pictures(F32, patch)
    kept = torch.tensor([[0, -1, 6, 2**62], [-(2**62), 6, 5, -1]])
    out = forward(lib, pixels, kept, patch, MEAN, STD, F32)
    close(out[0, :1], exact_of(pixels, torch.tensor([[0], [0]]), patch, MEAN, STD)[0])
    assert out[0, 1:].eq(0).all() and out[1, :2].eq(0).all() and out[1, 2].ne(0).any()
    grad = torch.randn(2, 4, 3 * patch * patch)
    ours = backward(lib, grad, kept, patch, None, pixels.shape, F32)
    assert torch.equal(reference.gather_patches(ours, torch.tensor([[0], [5]]), patch)[:, 0], grad[[0, 1], [0, 2]])
    for starts in ([0, 99, 8], [-7, 3, 2**31 - 1], [8, 4, -(2**31)]):
        cu = torch.tensor(starts, dtype=torch.int32)
        assert not forward(lib, pixels, kept.flatten(), patch, MEAN, STD, F32, cu).isnan().any()
        flat = grad.flatten(0, 1)
        assert not backward(lib, flat, kept.flatten(), patch, None, pixels.shape, F32, cu).isnan().any()


def test_strides_and_offsets_beyond_32_bits(library: Any) -> None:
    lib, kept = library("gather_patches"), torch.tensor([[1, 0], [1, 0]])
    room = torch.empty(2**31 + 4096, dtype=U8)
    pixels = room.as_strided((2, 1, 8, 16), (2**31, 1, 32, 1))
    pixels.copy_(pictures(U8, 8)[:, :1, :8, :16])
    ours = forward(lib, pixels, kept, 8, None, None, F32, stats=False, global_race=False)
    torch.testing.assert_close(ours, reference.gather_patches(pixels.clone(), kept, 8))


def test_bytes_are_the_ideal(library: Any) -> None:
    lib, keep = library("gather_patches"), 6
    pixels = torch.randint(256, (4, 3, 64, 64), dtype=U8)
    kept = torch.stack([torch.randperm(16)[:keep] for _ in range(4)])
    forward(lib, pixels, kept, 16, MEAN, STD, BF16)
    stats, numbers_moved = lib.log[0], kept.numel() * 3 * 256
    assert stats.unique_write_bytes == 2 * numbers_moved
    stores = stats.memory["global_st"]
    assert stores.bytes == 32 * stores.sectors
    # A line of a patch is half a sector: between once (both neighbours are kept) and twice what is kept.
    assert numbers_moved <= stats.unique_read_bytes <= 2 * numbers_moved + 1024
    grad = torch.randn(4, keep, 768).to(BF16)
    backward(lib, grad, kept, 16, STD, pixels.shape, BF16)
    moved = sum(each.unique_read_bytes + each.unique_write_bytes for each in lib.log)
    ideal = 2 * numbers_moved + pixels.numel() * 2
    assert moved <= 1.02 * (ideal + 3 * 64 * 8 + kept.numel() * 8)
