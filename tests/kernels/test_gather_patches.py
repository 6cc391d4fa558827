"""The Triton kernels of gather_patches, against the definition in float64 and the CPU's, where built, bit by bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oner_fast.ops import gather_patches, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.fixture(autouse=True)
def poisoned() -> None:
    """Every torch.empty holds NaN (-1 or so for integers), so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)


def pictures(
    dtype: torch.dtype, device: str, samples: int = 3, patch: int = 16, rows: int = 2, columns: int = 3
) -> Tensor:
    size = (samples, 3, rows * patch, columns * patch)
    if dtype == torch.uint8:
        return torch.randint(0, 256, size, dtype=dtype).to(device)
    return torch.randn(size).to(device, dtype).requires_grad_()


def outcome(
    implementation: str,
    images: Tensor,
    kept: Tensor,
    patch: int,
    mean: Any = MEAN,
    std: Any = STD,
    dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
    upstream: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The rows, and the images' gradient where they ask for one."""
    result = gather_patches(images, kept, patch, mean, std, dtype, cu_seqlens=cu_seqlens, implementation=implementation)
    rows = result[0] if isinstance(result, tuple) else result
    if not images.requires_grad:
        return (rows,)
    if upstream is None:
        upstream = torch.linspace(-1, 1, rows.numel(), device=rows.device).view_as(rows)
    return (rows.detach(), *torch.autograd.grad(rows, images, upstream.to(rows.dtype)))


def worst(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).abs().max())


KEPT, FLAT, STARTS = [[5, 0, 0, 0, 4], [2, 3, 3, 1, 2], [1, 5, 4, 3, 0]], [5, 0, 0, 2, 3, 3, 1, 2], [0, 3, 3, 8]


@pytest.mark.parametrize(
    ("pixels", "out", "patch", "is_ragged"),
    [
        (torch.uint8, torch.float32, 16, False),
        (torch.uint8, torch.bfloat16, 14, True),
        (torch.float32, torch.float32, 14, False),
        (torch.float16, torch.float32, 16, False),
        (torch.bfloat16, torch.bfloat16, 16, True),
        (torch.uint8, torch.float64, 4, False),
        (torch.float64, torch.float64, 5, True),
    ],
)
def test_error_is_near_that_of_plain_pytorch(
    pixels: torch.dtype, out: torch.dtype, patch: int, is_ragged: bool, device: str
) -> None:
    """At most twice (gradients three times) plain PyTorch's error against float64, and one unit in the last place."""
    images, cu_seqlens = pictures(pixels, device, patch=patch), None
    kept = torch.tensor(FLAT if is_ragged else KEPT, device=device)
    if is_ragged:
        cu_seqlens = torch.tensor(STARTS, dtype=torch.int32, device=device)
    exact_images = images if pixels == torch.uint8 else images.detach().double().requires_grad_()
    upstream = torch.randn(*kept.shape, 3 * patch * patch, device=device).to(out)
    given_as = {"cu_seqlens": cu_seqlens, "upstream": upstream}
    exact = outcome("reference", exact_images, kept, patch, dtype=torch.float64, **given_as)  # type: ignore[arg-type]
    ours, theirs = (outcome(n, images, kept, patch, dtype=out, **given_as) for n in ("triton", "reference"))  # type: ignore[arg-type]
    for k, (mine, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert mine.dtype == (pixels if k else out) and mine.shape == truth.shape
        few = 4 if mine.dtype == torch.float64 else 1  # the definition in float64 is the truth itself
        unit = few * torch.finfo(mine.dtype).eps * float(truth.abs().max())
        assert worst(mine, truth) <= (3 if k else 2) * worst(other, truth) + unit
    if device == "cpu" and (pixels, out) != (torch.uint8, torch.float64):  # there 255 mean is fused into the difference
        try:
            compiled = outcome("cpp", images, kept, patch, dtype=out, **given_as)  # type: ignore[arg-type]
        except RuntimeError:  # not built
            return
        assert all(torch.equal(mine, other) for mine, other in zip(ours, compiled, strict=True))


def test_constants_given_as_tensors_or_not_at_all(device: str) -> None:
    images, kept = pictures(torch.uint8, device), torch.tensor(KEPT, device=device)
    for mean, std in (
        (torch.tensor(MEAN, device=device).double(), torch.tensor(STD, device=device).double()),
        (None, None),
    ):
        (ours,), (theirs,) = (outcome(n, images, kept, 16, mean, std) for n in ("triton", "reference"))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_strides(device: str) -> None:
    images, kept = pictures(torch.float32, device).detach(), torch.tensor(KEPT, device=device)
    (expected,) = outcome("triton", images, kept, 16)
    larger = torch.zeros(3, 5, 36, 55, device=device)
    larger[:, 1:4, 2:34, 3:51] = images
    for strange in (
        larger[:, 1:4, 2:34, 3:51],
        images.contiguous(memory_format=torch.channels_last),
    ):
        assert torch.equal(outcome("triton", strange, kept.t().contiguous().t(), 16)[0], expected)
    grown = images.requires_grad_()
    (ours,), (theirs,) = (
        torch.autograd.grad(gather_patches(grown, kept, 16, implementation=n).transpose(0, 1)[::2].sum(), grown)
        for n in ("triton", "reference")
    )
    assert torch.equal(ours, theirs)


def test_only_kept_patches_are_read(device: str) -> None:
    images = torch.full((1, 1, 4, 4), float("nan"), device=device)
    images[..., :2, 2:] = 7
    result = gather_patches(images, torch.tensor([[1]], device=device), 2, implementation="triton")
    assert torch.equal(result, torch.full((1, 1, 4), 7.0, device=device))


@settings(max_examples=15 if INTERPRETED else 5)  # where kernels are compiled, each new patch is
@given(
    samples=st.integers(0, 3), rows=st.integers(1, 3), columns=st.integers(1, 3),
    patch=st.sampled_from([1, 3, 8] if INTERPRETED else [3]),
    kept=st.integers(0, 6), is_ragged=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(
    device: str, samples: int, rows: int, columns: int, patch: int, kept: int, is_ragged: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    images = pictures(torch.float32, device, samples, patch, rows, columns)
    indices, cu_seqlens = torch.randint(rows * columns, (samples, kept)), None
    if is_ragged:
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(0, kept + 1, (samples,)).cumsum(0)])
        indices, cu_seqlens = torch.randint(rows * columns, (int(starts[-1]),)), starts.int().to(device)
    indices = indices.to(device)
    ours = outcome("triton", images, indices, patch, None, STD, cu_seqlens=cu_seqlens)
    assert ours[0].shape == (*indices.shape, 3 * patch * patch)
    if ours[0].numel() == 0:
        assert not ours[1].any()
        return
    theirs = outcome("reference", images, indices, patch, None, STD, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_patches_with_a_side_longer_than_a_tile(device: str) -> None:
    images = torch.randint(0, 256, (1, 1, 70, 140), dtype=torch.uint8, device=device)
    kept = torch.tensor([[1, 0]], device=device)
    (ours,), (theirs,) = (outcome(n, images, kept, 70, None, None) for n in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [-1, 6, 2**40, -(2**62)])
def test_bad_indices_touch_nothing(bad: int, device: str) -> None:
    images, kept = pictures(torch.float32, device).detach(), torch.tensor(KEPT, device=device)
    (expected,) = outcome("triton", images, kept, 16, None, None)
    kept[1, 2] = bad
    result = torch.ops.oner_fast_triton.gather_patches(images, kept, 16, None, None, torch.float32, None)
    expected[1, 2] = torch.nan
    assert torch.equal(result.nan_to_num(9.0), expected.nan_to_num(9.0))
    grad = torch.ones_like(result)
    found = torch.ops.oner_fast_triton.gather_patches_backward(grad, kept, 16, None, images.shape, torch.float32, None)
    assert int(found.sum()) == 14 * 3 * 256


@pytest.mark.parametrize("executor", [{"race" if INTERPRETED else "global_race": False}], indirect=True)
@pytest.mark.parametrize("starts", [[0, 900, -7, 15], [3, 2, 1, 0], [0, 2**31 - 1, 0, 15], [0, 6, 1, 6]])
def test_bad_boundaries_touch_nothing(executor: Any, starts: list[int], device: str) -> None:
    images, kept = pictures(torch.float32, device).detach(), torch.tensor(KEPT, device=device).flatten()
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    result = torch.ops.oner_fast_triton.gather_patches(images, kept, 16, None, None, torch.float32, cu_seqlens)
    found = torch.ops.oner_fast_triton.gather_patches_backward(
        torch.randn_like(result), kept, 16, None, images.shape, torch.float32, cu_seqlens
    )
    assert result.shape == (15, 768) and found.shape == images.shape


def test_pixels_beyond_two_to_the_31(executor: Any, device: str, tmp_path: Path) -> None:
    """A few lines of 6 GiB of bytes (a sparse file) are touched, so that offsets need 64 bits."""
    if executor is None:
        pytest.skip("needs the emulation: the interpreter shadows every byte, and a GPU would have to hold them")
    size = 3 * 2**31
    file = tmp_path / "pixels"
    file.touch()
    images = torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)
    images = images.as_strided((2, 1, 16, 32), (2**31 + 4096, 0, 2**27 + 64, 1))
    images.copy_(torch.randint(0, 256, (2, 1, 16, 32), dtype=torch.uint8))
    kept = torch.tensor([[1, 0], [1, 1]])
    (ours,) = outcome("triton", images, kept, 16, None, None)
    expected = reference.gather_patches(images.contiguous(), kept, 16)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    file.unlink()


def test_compiles_as_one_graph(device: str) -> None:
    images, kept = pictures(torch.float32, device), torch.tensor(KEPT, device=device)

    def run(images: Tensor) -> Tensor:
        out = gather_patches(images, kept, 16, MEAN, STD, implementation="triton")
        return (out[0] if isinstance(out, tuple) else out) * 2

    torch._dynamo.reset()
    ours, theirs = torch.compile(run, fullgraph=True, backend="aot_eager")(images), run(images)
    assert torch.equal(ours, theirs)
    mine, other = (torch.autograd.grad(x, images, torch.ones_like(x))[0] for x in (ours, theirs))
    assert torch.equal(mine, other)


def sectors(places: Tensor) -> int:
    """Count the sectors of 32 bytes that hold these."""
    return int((places // 32).unique().numel())


@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
def test_bytes_are_the_ideal(executor: Any, pixels: torch.dtype, device: str) -> None:
    """Within a tenth: the sectors of kept patches once, the result once; all accesses of 16 bytes."""
    if executor is None:
        pytest.skip("the counters are those of the emulated GPU")
    images = pictures(pixels, device, 2, 16, 8, 8)
    kept = torch.stack([torch.randperm(64)[:32] for _ in range(2)])
    outcome("triton", images, kept, 16)
    numbers, size = 2 * 32 * 768, images.element_size()
    places = torch.arange(images.numel()).view(images.shape).double()
    touched = sectors(reference.gather_patches(places, kept, 16, dtype=torch.float64).long() * size)
    stats = [launch.stats for launch in executor]
    moved = [each.unique_read_bytes + each.unique_write_bytes for each in stats]
    assert moved[0] <= 1.05 * (32 * touched + 4 * numbers + 8 * kept.numel())
    if pixels != torch.uint8:
        assert moved[1] + moved[2] <= 1.05 * (4 * numbers + 4 * images.numel())
    for each in (stats[0], stats[-1]):
        wide = [a for place, kind, a in each.places if kind.startswith("global") and ".v4." in place]
        assert sum(a.bytes for a in wide) >= numbers * (size + 4)
