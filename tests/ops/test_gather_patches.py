from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oner_fast import _extension
from oner_fast.ops import gather_patches, reference

module = importlib.import_module("oner_fast.ops.gather_patches")
compiled = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")
EVERY = ["reference", "portable", pytest.param("cpp", marks=compiled)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def pictures(
    dtype: torch.dtype = torch.uint8, samples: int = 2, channels: int = 3, height: int = 8, width: int = 12
) -> Tensor:
    size = (samples, channels, height, width)
    return torch.randint(0, 256, size, dtype=torch.uint8) if dtype == torch.uint8 else torch.randn(size, dtype=dtype)


@pytest.mark.parametrize("implementation", EVERY)
def test_a_linear_on_patches_is_the_patch_convolution(implementation: str) -> None:
    images = pictures(torch.float64)
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    kept = torch.stack([torch.randperm(6) for _ in range(2)])[:, :4]
    patches = gather_patches(images, kept, 4, implementation=implementation)
    everywhere = F.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)  # (B, N, 5), row-major grid
    assert isinstance(patches, Tensor)
    expected = everywhere.gather(1, kept.unsqueeze(-1).expand(-1, -1, 5))
    torch.testing.assert_close(patches @ weight.flatten(1).T, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given_as", ["sequence", "tensor", "nothing"])
def test_uint8_is_scaled_and_normalised(implementation: str, dtype: torch.dtype, given_as: str) -> None:
    images, kept = pictures(), torch.tensor([[5, 0, 0], [2, 3, 1]])
    mean: Any = {"sequence": MEAN, "tensor": torch.tensor(MEAN, dtype=torch.float64), "nothing": None}[given_as]
    std: Any = {"sequence": STD, "tensor": torch.tensor(STD, dtype=torch.float64), "nothing": None}[given_as]
    result = gather_patches(images, kept, 4, mean, std, dtype, implementation=implementation)
    assert isinstance(result, Tensor) and result.dtype == dtype and result.shape == (2, 3, 48)
    shift, divisor = (MEAN, STD) if mean is not None else ((0.0,) * 3, (1.0,) * 3)
    for b in range(2):
        for i, n in enumerate(kept[b].tolist()):
            y, x = n // 3 * 4, n % 3 * 4
            square = images[b, :, y : y + 4, x : x + 4].double() / 255
            square = (square - torch.tensor(shift).double().view(3, 1, 1)) / torch.tensor(divisor).double().view(
                3, 1, 1
            )
            unit = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * (dtype != torch.float64))
            tolerance = (1e-7 if dtype == torch.float64 else 2 * unit) * max(1.0, float(square.abs().max()))
            assert float((result[b, i].double() - square.flatten()).abs().max()) <= tolerance


def test_default_dtypes() -> None:
    kept = torch.zeros(2, 1, dtype=torch.int64)
    for given_dtype, result_dtype in [(torch.uint8, torch.float32), *((d, d) for d in DTYPES)]:
        result = gather_patches(pictures(given_dtype), kept, 4)
        assert isinstance(result, Tensor) and result.dtype == result_dtype


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_error_is_near_that_of_plain_pytorch(dtype: torch.dtype, out: torch.dtype) -> None:
    images = pictures(dtype).requires_grad_()
    kept = torch.tensor([[5, 0, 0, 0, 4], [2, 3, 3, 1, 2]])
    exact_images = images.detach().double().requires_grad_()
    exact = reference.gather_patches(exact_images, kept, 4, MEAN, STD, torch.float64)
    ours = gather_patches(images, kept, 4, MEAN, STD, out, implementation="cpp")
    theirs = reference.gather_patches(images, kept, 4, MEAN, STD, out)
    assert isinstance(ours, Tensor) and isinstance(theirs, Tensor) and isinstance(exact, Tensor) and ours.dtype == out

    def worst(x: Tensor, truth: Tensor) -> float:
        return float((x.double() - truth).abs().max())

    unit = torch.finfo(out).eps * float(exact.detach().abs().max())
    assert worst(ours, exact) <= 2 * worst(theirs, exact) + unit
    upstream = torch.randn(exact.shape, dtype=torch.float64).to(out)
    (truth,) = torch.autograd.grad(exact, exact_images, upstream.double())
    (mine,) = torch.autograd.grad(ours, images, upstream)
    (other,) = torch.autograd.grad(theirs, images, upstream)
    assert mine.dtype == dtype
    assert worst(mine, truth) <= 3 * worst(other, truth) + torch.finfo(dtype).eps * float(truth.detach().abs().max())


@pytest.mark.parametrize("implementation", EVERY)
def test_gradcheck(implementation: str) -> None:
    images = pictures(torch.float64, 2, 2, 4, 6).requires_grad_()
    kept = torch.tensor([[5, 5, 0], [1, 2, 1]])
    assert torch.autograd.gradcheck(
        lambda x: gather_patches(x, kept, 2, (0.1, 0.2), (0.5, 2.0), implementation=implementation), (images,)
    )
    cu_seqlens = torch.tensor([0, 1, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda x: gather_patches(x, kept.flatten(), 2, cu_seqlens=cu_seqlens, implementation=implementation)[0],
        (images,),
    )


@compiled
@given(
    samples=st.integers(0, 3), channels=st.integers(0, 4), rows=st.integers(0, 3), columns=st.integers(0, 3),
    patch=st.integers(1, 9), kept=st.integers(0, 6), ragged=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(
    samples: int, channels: int, rows: int, columns: int, patch: int, kept: int, ragged: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    images = pictures(torch.float64, samples, channels, max(rows, 1) * patch, max(columns, 1) * patch).requires_grad_()
    cells = max(rows, 1) * max(columns, 1)
    indices, cu_seqlens = torch.randint(cells, (samples, kept)), None
    if ragged:
        lengths = torch.randint(0, kept + 1, (samples,))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        indices, cu_seqlens = torch.randint(cells, (int(starts[-1]),)), starts.int()

    ours = gather_patches(images, indices, patch, cu_seqlens=cu_seqlens, implementation="cpp")
    boundaries = cu_seqlens
    if isinstance(ours, tuple):
        ours, boundaries = ours
        assert torch.equal(boundaries, cu_seqlens)
    assert ours.shape == (*indices.shape, channels * patch * patch)
    if ours.numel() == 0:
        return
    theirs = reference.gather_patches(images, indices, patch, cu_seqlens=cu_seqlens)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, images, weights), torch.autograd.grad(theirs, images, weights), rtol=1e-12, atol=1e-12
    )


@compiled
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_strides(dtype: torch.dtype) -> None:
    images, kept = pictures(dtype), torch.tensor([[5, 0], [2, 3]])
    expected = reference.gather_patches(images, kept, 4, MEAN, STD, torch.float64)
    larger = torch.zeros(2, 5, 11, 17, dtype=dtype)
    larger[:, 1:4, 2:10, 3:15] = images
    for strange in (
        larger[:, 1:4, 2:10, 3:15],
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        images.flip(3).flip(3),
    ):
        result = gather_patches(strange, kept, 4, MEAN, STD, torch.float64, implementation="cpp")
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            result, gather_patches(images, kept, 4, MEAN, STD, torch.float64, implementation="cpp"), rtol=0, atol=0
        )


@compiled
def test_only_kept_patches_are_read() -> None:
    images = torch.full((1, 1, 4, 4), float("nan"))
    images[..., :2, 2:] = 7
    result = gather_patches(images, torch.tensor([[1]]), 2, implementation="cpp")
    torch.testing.assert_close(result, torch.full((1, 1, 4), 7.0), rtol=0, atol=0)


@compiled
def test_same_bits_with_any_threads_under_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    images = pictures(torch.bfloat16, 3, 3, 64, 64).requires_grad_()
    kept = torch.randint(0, 4, (3, 50))
    upstream = torch.randn(3, 50, 3 * 16 * 16).bfloat16()
    seen = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        result = gather_patches(images, kept, 16, MEAN, STD, implementation="cpp")
        assert isinstance(result, Tensor)
        seen.append((result.detach(), *torch.autograd.grad(result, images, upstream)))
    for other in seen[1:]:
        assert torch.equal(seen[0][0], other[0]) and torch.equal(seen[0][1], other[1])


@compiled
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("patch", [7, 8, 14, 16, 32])
def test_large_results_bypass_the_cache_with_the_same_bits(dtype: torch.dtype, patch: int) -> None:
    """More than 64 MiB; sample by sample, each is written the other way. 7 and 14: lines that no vector divides."""
    images = pictures(dtype, 12, 3, 4 * patch, 5 * patch)
    kept = torch.randint(20, (12, (64 << 20) // (12 * 3 * patch * patch * 4) + 1))
    everything = gather_patches(images, kept, patch, MEAN, STD, implementation="cpp")
    assert everything.numel() * 4 > 64 << 20
    for b in range(12):
        few = kept[b : b + 1, :9]
        alone = gather_patches(images[b : b + 1], few, patch, MEAN, STD, implementation="cpp")
        assert torch.equal(everything[b, :9], alone[0])
        plain = reference.gather_patches(images[b : b + 1], few, patch, MEAN, STD)
        torch.testing.assert_close(alone, plain, rtol=1e-6, atol=1e-6)


@compiled
def test_patches_larger_than_any_buffer() -> None:
    images, kept = torch.randint(0, 256, (1, 1, 1100, 2200), dtype=torch.uint8), torch.tensor([[1, 0]])
    ours = gather_patches(images, kept, 1100, implementation="cpp")
    torch.testing.assert_close(ours, reference.gather_patches(images, kept, 1100), rtol=1e-6, atol=0)


def test_constants_for_a_gpu_are_filled_on_it_once() -> None:
    """torch.tensor(numbers, device="cuda") would wait for the GPU and break a graph's capture."""
    device = torch.device("cpu")
    with torch.inference_mode():
        first = module._constants(MEAN, device, 0)
    assert torch.equal(first, torch.tensor(MEAN, dtype=torch.float64)) and not first.is_inference()
    assert module._constants(MEAN, device, 0) is first and module._constants(MEAN, device, 1) is not first
    assert module._filled((), device).shape == (0,)


def test_autocast_does_not_change_the_dtype() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gather_patches(IMAGES, K, 4).dtype == torch.float32


@compiled
def test_saves_the_indices_and_the_divisor_alone() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    images, kept = pictures(torch.float32).requires_grad_(), torch.tensor([[5, 0], [2, 3]])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gather_patches(images, kept, 4, MEAN, STD, implementation="cpp")
    assert sum(x.numel() * x.element_size() for x in saved) == kept.numel() * 8 + 3 * 8


@compiled
def test_opcheck() -> None:
    images, kept = pictures(torch.float32), torch.tensor([[5, 0], [2, 3]])
    shift, divisor = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, 1, 4], dtype=torch.int32)
    op, back = torch.ops.oner_fast.gather_patches.default, torch.ops.oner_fast.gather_patches_backward.default
    torch.library.opcheck(op, (images, kept, 4, shift, divisor, torch.bfloat16, None))
    torch.library.opcheck(op, (pictures(), kept.flatten(), 4, None, None, torch.float32, cu_seqlens))
    torch.library.opcheck(back, (torch.randn(2, 2, 48), kept, 4, divisor, [2, 3, 8, 12], torch.float32, None))
    torch.library.opcheck(back, (torch.randn(4, 48), kept.flatten(), 4, None, [2, 3, 8, 12], torch.half, cu_seqlens))


@compiled
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_compiles_as_one_graph(dtype: torch.dtype) -> None:
    images, kept = pictures(dtype), torch.tensor([[5, 0], [2, 3]])
    if dtype != torch.uint8:
        images.requires_grad_()

    def run(images: Tensor) -> Tensor:
        out = gather_patches(images, kept, 4, MEAN, STD, implementation="cpp")
        return (out[0] if isinstance(out, tuple) else out) * 2

    torch._dynamo.reset()
    ours, theirs = torch.compile(run, fullgraph=True, backend="aot_eager")(images), run(images)
    torch.testing.assert_close(ours, theirs)
    if dtype != torch.uint8:
        upstream = torch.randn_like(theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours, images, upstream), torch.autograd.grad(theirs, images, upstream)
        )


IMAGES, K = torch.zeros(2, 3, 8, 12, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64)
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "images must be a torch.Tensor, got str", {"images": "cat.png"}),
    (TypeError, "images must be uint8 or floating, got torch.int64", {"images": IMAGES.long()}),
    (ValueError, r"images must have shape \(B, C, H, W\)", {"images": IMAGES[0]}),
    (ValueError, "multiples of patch_size 5, got 8 x 12", {"patch_size": 5}),
    (ValueError, "patch_size must be at least 1, got 0", {"patch_size": 0}),
    (TypeError, "patch_size must be an int, got float", {"patch_size": 4.0}),
    (ValueError, "mean must hold one number a channel, 3, got 2", {"mean": (0.5, 0.5)}),
    (ValueError, "std must hold one number a channel, 3, got 1", {"std": torch.ones(1)}),
    (TypeError, "dtype must be float32.*got torch.int8", {"dtype": torch.int8}),
    (TypeError, "kept must be int64, got torch.int32", {"kept": K.int()}),
    (IndexError, r"kept must hold values in \[0, 6\), found 6", {"kept": K + 6}),
    (ValueError, r"kept must have shape \(B, K\)", {"kept": K[0]}),
    (ValueError, "cu_seqlens must end with", {"kept": K[0], "cu_seqlens": torch.tensor([0, 1, 1], dtype=torch.int32)}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), WRONG)
def test_errors_name_the_bad_argument(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        gather_patches(**{"images": IMAGES, "kept": K, "patch_size": 4, **arguments})
