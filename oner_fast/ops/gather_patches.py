"""gather_patches: read the kept patches of an image alone, and normalise, cast and flatten them for a Linear."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from oner_fast.ops import batching, checks, reference
from oner_fast.ops.implementations import Facts, register
from oner_fast.ops.library import define, raw_ops, why_not_cuda, why_not_triton
from oner_fast.ops.serve import serve
from oner_fast.ops.transforms import Values, differentiable, inside_transform


def _fold(
    op: Any,
    size: int,
    batched: batching.Flags,
    images: Tensor,
    kept: Tensor,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> batching.Results | None:
    """Take the batch as further samples, unless its elements are normalised by numbers of their own."""
    if batched[3] or batched[4]:
        return None
    images, kept, cu_seqlens = batching.samples(size, batched[0], images, batched[1], kept, batched[6], cu_seqlens)
    return (batching.elements(op(images, kept, patch_size, mean, std, dtype, cu_seqlens), size),)


def _fold_backward(
    op: Any,
    size: int,
    batched: batching.Flags,
    grad: Tensor,
    kept: Tensor,
    patch_size: int,
    std: Tensor | None,
    image_shape: Sequence[int],
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> batching.Results | None:
    if batched[3]:
        return None
    grad, kept, cu_seqlens = batching.samples(size, batched[0], grad, batched[1], kept, batched[6], cu_seqlens)
    shape = (size * image_shape[0], *image_shape[1:])
    return (op(grad, kept, patch_size, std, shape, dtype, cu_seqlens).view(size, *image_shape),)


@define(
    "gather_patches(Tensor images, Tensor kept, SymInt patch_size, Tensor? mean, Tensor? std, ScalarType dtype, "
    "Tensor? cu_seqlens) -> Tensor",
    triton="gather_patches.forward",
    fold=_fold,
    portable=True,
)
def _forward_shape(
    images: Tensor,
    kept: Tensor,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return images.new_empty((*kept.shape, images.shape[1] * patch_size * patch_size), dtype=dtype)


@define(
    "gather_patches_backward(Tensor grad, Tensor kept, SymInt patch_size, Tensor? std, SymInt[] image_shape, "
    "ScalarType dtype, Tensor? cu_seqlens) -> Tensor",
    triton="gather_patches.backward",
    fold=_fold_backward,
    portable=True,
)
def _backward_shape(
    grad: Tensor,
    kept: Tensor,
    patch_size: int,
    std: Tensor | None,
    image_shape: Sequence[int],
    dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return grad.new_empty(image_shape, dtype=dtype)


class _GatherPatches:
    """The gradient of the images; only the indices and the divisor of each channel are saved for it."""

    @staticmethod
    def compute(
        images: Tensor,
        kept: Tensor,
        patch_size: int,
        mean: Tensor | None,
        std: Tensor | None,
        dtype: torch.dtype,
        cu_seqlens: Tensor | None,
        backend: str,
    ) -> tuple[Tensor]:
        return (raw_ops(backend).gather_patches(images, kept, patch_size, mean, std, dtype, cu_seqlens),)

    @staticmethod
    def remember(ctx: Any, arguments: Values, results: Values) -> None:
        images, kept, ctx.patch_size, _, std, _, cu_seqlens, ctx.backend = arguments
        ctx.save_for_backward(kept, std, cu_seqlens)
        ctx.image_shape, ctx.image_dtype = images.shape, images.dtype

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, std, cu_seqlens = ctx.saved_tensors
        images = raw_ops(ctx.backend).gather_patches_backward(
            grad, kept, ctx.patch_size, std, ctx.image_shape, ctx.image_dtype, cu_seqlens
        )
        return images, None, None, None, None, None, None, None


_gather_patches = differentiable("gather_patches", _GatherPatches)


def _per_channel(values: Tensor | Sequence[float] | None, images: Tensor) -> Tensor | None:
    """Return (C,) float64 on the device of the images; host numbers reach a GPU without a copy, which would wait."""
    if values is None:
        return None
    device = images.device
    if isinstance(values, Tensor) and (values.device == device or device.type != "cuda"):
        return values.detach().to(device, torch.float64).flatten()
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.float64, device=device)
    if not isinstance(values, Tensor):
        numbers = tuple(float(value) for value in values)
    elif values.device.type == "cpu" and not torch.compiler.is_compiling():
        numbers = tuple(values.double().flatten().tolist())
    else:
        return values.detach().to(device, torch.float64).flatten()
    # A tensor made during graph capture belongs to the graph, and one for a fake image is fake: neither is cached.
    if torch.compiler.is_compiling() or type(images) is not Tensor or torch.cuda.is_current_stream_capturing():
        return _filled(numbers, device)
    return _constants(numbers, device, torch.cuda.current_stream(device).cuda_stream)


def _filled(values: tuple[float, ...], device: torch.device) -> Tensor:
    if not values:
        return torch.empty(0, dtype=torch.float64, device=device)
    return torch.stack([torch.full((), value, dtype=torch.float64, device=device) for value in values])


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device, stream: int) -> Tensor:
    """Return cached constants, one set for each stream; never inference tensors, which autograd could not save."""
    with torch.inference_mode(False):
        return _filled(values, device)


def _compiled(
    backend: str,
    images: Tensor,
    kept: Tensor,
    patch_size: int,
    mean: Tensor | Sequence[float] | None,
    std: Tensor | Sequence[float] | None,
    dtype: torch.dtype | None,
    *,
    cu_seqlens: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    result = dtype or (torch.float32 if images.dtype == torch.uint8 else images.dtype)
    shift, divisor = _per_channel(mean, images), _per_channel(std, images)
    # uint8 images take no gradient; a call through autograd would cost as much as the rest of the Python here.
    given = (images, kept, patch_size, shift, divisor, result, cu_seqlens)
    asks = images.requires_grad and torch.is_grad_enabled()
    asks = asks or forward_ad._current_level >= 0 or (images.dtype != torch.uint8 and inside_transform())
    packed = _gather_patches(*given, backend) if asks else raw_ops(backend).gather_patches(*given)
    return packed if cu_seqlens is None else (packed, cu_seqlens.clone())


_shapes = partial(_compiled, "cpp")
register("gather_patches", "reference", reference.gather_patches, preference=-10)
register("gather_patches", "portable", partial(_compiled, "portable"))
register("gather_patches", "cpp", partial(_compiled, "cpp"), devices=("cpu",), preference=100, compiled=True)
# Preferred over Triton, whose kernels move the same bytes: no launcher in Python, nothing to compile at the first call.
register(
    "gather_patches", "cuda", partial(_compiled, "cuda"), devices=("cuda",), preference=60, compiled=True,
    reasons=why_not_cuda("gather_patches"),
)  # fmt: skip
register(
    "gather_patches", "triton", partial(_compiled, "triton"), devices=("cuda",), on_request=("cpu",), preference=50,
    reasons=why_not_triton,
)  # fmt: skip


def facts(images: Tensor, *rest: Any, **options: Any) -> Facts:
    """Return the facts of a call with these arguments, by which its implementation is chosen; nothing is computed."""
    return "gather_patches", images.device.type, {"dtype": images.dtype}


@overload
def gather_patches(
    images: Tensor,
    kept: Tensor,
    patch_size: int,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    *,
    cu_seqlens: None = None,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def gather_patches(
    images: Tensor,
    kept: Tensor,
    patch_size: int,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    *,
    cu_seqlens: Tensor,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def gather_patches(
    images: Tensor,
    kept: Tensor,
    patch_size: int,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise and flatten the kept patches of each image, so that a Linear embeds them alone.

    No other patch is read. Floating-point images take a gradient, which is deterministic.

    Args:
        images: (B, C, H, W), uint8 (scaled to [0, 1]) or floating-point (used as they are). `patch_size` must divide H
            and W.
        kept: (B, K) int64 with values in [0, N), where N = (H / patch_size) * (W / patch_size) patches are counted row
            by row. Repeats are allowed. With `cu_seqlens`: (T,), the samples one after the other.
        patch_size: the side of a patch in pixels.
        mean: one number for each channel, subtracted after the scaling. It takes no gradient.
        std: one number for each channel, by which the difference is divided. It takes no gradient.
        dtype: the dtype of the result. The default is float32 for uint8 images, else that of the images.
        cu_seqlens: (B + 1,) int32 or int64, the boundaries of the samples in a flat `kept`.
        implementation: force one by name; see `oner_fast.ops.implementations`.

    Returns:
        (B, K, C * patch_size**2), each patch in the order of the weight of a patch convolution. With `cu_seqlens`, the
            pair of (T, C * patch_size**2) and a copy of `cu_seqlens` in int32.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit, or `cu_seqlens` do not describe `kept`.
        IndexError: a value of `kept` is outside [0, N). On CUDA, values are checked only with `ONER_FAST_DEBUG=1`.
        RuntimeError: the forced implementation cannot run this call.
    """
    cu_seqlens = checks.as_int32("gather_patches", "cu_seqlens", cu_seqlens)
    checks.gather_patches(images, kept, patch_size, mean, std, dtype, cu_seqlens)
    function = serve(facts(images), implementation, images, _shapes)
    found: Tensor | tuple[Tensor, Tensor] = function(images, kept, patch_size, mean, std, dtype, cu_seqlens=cu_seqlens)
    return found
