"""masked_gather: keep chosen tokens of each sample, add their positions and prepend a prefix, in one pass."""

from __future__ import annotations

from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from oner_fast.ops import batching, checks, reference
from oner_fast.ops.implementations import Facts, register
from oner_fast.ops.library import define, raw_ops, why_not_cuda, why_not_triton
from oner_fast.ops.serve import serve
from oner_fast.ops.transforms import Values, differentiable


def _fold(
    op: Any,
    size: int,
    batched: batching.Flags,
    tokens: Tensor,
    kept: Tensor,
    positions: Tensor | None,
    prefix: Tensor | None,
    cu_seqlens: Tensor | None,
) -> batching.Results | None:
    """Take the batch as further samples, unless its elements have positions or prefixes of their own."""
    if batched[2] or batched[3]:
        return None
    tokens, kept, cu_seqlens = batching.samples(size, batched[0], tokens, batched[1], kept, batched[4], cu_seqlens)
    return (batching.elements(op(tokens, kept, positions, prefix, cu_seqlens), size),)


def _fold_backward(
    op: Any,
    size: int,
    batched: batching.Flags,
    grad: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    samples: int,
    tokens: int,
    prefix: int,
    need_tokens: bool,
    need_positions: bool,
    need_prefix: bool,
) -> batching.Results | None:
    """Take the batch as further samples, unless gradients are wanted that are sums over samples."""
    if need_positions or need_prefix:
        return None
    grad, kept, cu_seqlens = batching.samples(size, batched[0], grad, batched[1], kept, batched[2], cu_seqlens)
    to_tokens, *rest = op(grad, kept, cu_seqlens, size * samples, tokens, prefix, need_tokens, False, False)
    return (batching.elements(to_tokens, size), *(x.expand(size, 0) for x in rest))


@define(
    "masked_gather(Tensor tokens, Tensor kept, Tensor? positions, Tensor? prefix, Tensor? cu_seqlens) -> Tensor",
    triton="masked_gather.forward",
    fold=_fold,
    portable=True,
)
def _forward_shape(
    tokens: Tensor, kept: Tensor, positions: Tensor | None, prefix: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    length = 0 if prefix is None else prefix.shape[0]
    if cu_seqlens is None:
        return tokens.new_empty(tokens.shape[0], kept.shape[1] + length, tokens.shape[2])
    return tokens.new_empty(kept.shape[0] + tokens.shape[0] * length, tokens.shape[2])


@define(
    "masked_gather_backward(Tensor grad, Tensor kept, Tensor? cu_seqlens, SymInt samples, SymInt tokens, "
    "SymInt prefix, bool need_tokens, bool need_positions, bool need_prefix) -> (Tensor, Tensor, Tensor)",
    triton="masked_gather.backward",
    fold=_fold_backward,
    portable=True,
)
def _backward_shape(
    grad: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    samples: int,
    tokens: int,
    prefix: int,
    need_tokens: bool,
    need_positions: bool,
    need_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = grad.shape[-1]
    return (
        grad.new_empty((samples, tokens, width) if need_tokens else (0,)),
        grad.new_empty((tokens, width) if need_positions else (0,)),
        grad.new_empty((prefix, width) if need_prefix else (0,)),
    )


class _MaskedGather:
    """The gradients of tokens, positions and prefix; only the indices are saved for them."""

    @staticmethod
    def compute(
        tokens: Tensor,
        kept: Tensor,
        positions: Tensor | None,
        prefix: Tensor | None,
        cu_seqlens: Tensor | None,
        backend: str,
    ) -> tuple[Tensor]:
        return (raw_ops(backend).masked_gather(tokens, kept, positions, prefix, cu_seqlens),)

    @staticmethod
    def remember(ctx: Any, arguments: Values, results: Values) -> None:
        tokens, kept, _, prefix, cu_seqlens, ctx.backend = arguments
        ctx.save_for_backward(kept, cu_seqlens)
        ctx.sizes = (tokens.shape[0], tokens.shape[1], 0 if prefix is None else prefix.shape[0])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, cu_seqlens = ctx.saved_tensors
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        tokens, positions, prefix = raw_ops(ctx.backend).masked_gather_backward(
            grad, kept, cu_seqlens, *ctx.sizes, *need
        )
        results = (tokens if need[0] else None, None, positions if need[1] else None, prefix if need[2] else None)
        return (*results, None, None)


_masked_gather = differentiable("masked_gather", _MaskedGather)


def _compiled(
    backend: str,
    tokens: Tensor,
    kept: Tensor,
    positions: Tensor | None,
    prefix: Tensor | None,
    *,
    cu_seqlens: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    packed = _masked_gather(tokens, kept, positions, prefix, cu_seqlens, backend)
    if cu_seqlens is None:
        return packed
    return packed, ragged_boundaries(cu_seqlens, 0 if prefix is None else prefix.shape[0])


def ragged_boundaries(cu_seqlens: Tensor, prefix: int) -> Tensor:
    """Return cu_seqlens (B + 1,) int32 for samples that grew by `prefix` rows each, computed on its device."""
    if prefix == 0:
        return cu_seqlens.clone()
    return cu_seqlens + prefix * torch.arange(cu_seqlens.shape[0], dtype=cu_seqlens.dtype, device=cu_seqlens.device)


_shapes = partial(_compiled, "cpp")
register("masked_gather", "reference", reference.masked_gather, preference=-10)
register("masked_gather", "portable", partial(_compiled, "portable"))
register("masked_gather", "cpp", partial(_compiled, "cpp"), devices=("cpu",), preference=100, compiled=True)
# Preferred over Triton, whose kernels move the same bytes: no launcher in Python, nothing to compile at the first call.
register(
    "masked_gather", "cuda", partial(_compiled, "cuda"), devices=("cuda",), preference=60, compiled=True,
    reasons=why_not_cuda("masked_gather"),
)  # fmt: skip
register(
    "masked_gather", "triton", partial(_compiled, "triton"), devices=("cuda",), on_request=("cpu",), preference=50,
    reasons=why_not_triton,
)  # fmt: skip


def facts(tokens: Tensor, *rest: Any, **options: Any) -> Facts:
    """Return the facts of a call with these arguments, by which its implementation is chosen; nothing is computed."""
    return "masked_gather", tokens.device.type, {"dtype": tokens.dtype}


@overload
def masked_gather(
    tokens: Tensor,
    kept: Tensor,
    positions: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    cu_seqlens: None = None,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def masked_gather(
    tokens: Tensor,
    kept: Tensor,
    positions: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    cu_seqlens: Tensor,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def masked_gather(
    tokens: Tensor,
    kept: Tensor,
    positions: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Gather the kept tokens of each sample, add their positions, and prepend the prefix.

    Row k of sample b is `tokens[b, kept[b, k]] + positions[kept[b, k]]`. Gradients reach tokens, positions and prefix.
    They are deterministic and summed in float32 for half-precision types; only the indices are saved for them.

    Args:
        tokens: (B, N, D) float32, float16, bfloat16 or float64, of any strides.
        kept: (B, K) int64 with values in [0, N), in any order; repeats are allowed. With `cu_seqlens`: (T,), the
            samples one after the other.
        positions: (N, D) in the dtype of the tokens, added to them. The sum of half-precision types is rounded once.
            Under autocast another floating-point dtype is cast to that of the tokens.
        prefix: (P, D) as `positions`, placed in front of every sample (for example [CLS]).
        cu_seqlens: (B + 1,) int32 or int64, the boundaries of the samples in a flat `kept`.
        implementation: force one by name; see `oner_fast.ops.implementations`.

    Returns:
        (B, P + K, D) in the dtype of the tokens. With `cu_seqlens`, the pair of (T + B * P, D) and the new boundaries
            (B + 1,) int32, `cu_seqlens[b] + b * P`.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit, or `cu_seqlens` do not describe `kept`.
        IndexError: a value of `kept` is outside [0, N). On CUDA, values are checked only with `ONER_FAST_DEBUG=1`.
        RuntimeError: the forced implementation cannot run this call.
    """
    checks.is_tensor("masked_gather", "tokens", tokens)
    positions, prefix = checks.cast_like(tokens, positions, prefix)
    cu_seqlens = checks.as_int32("masked_gather", "cu_seqlens", cu_seqlens)
    checks.masked_gather(tokens, kept, positions, prefix, cu_seqlens)
    function = serve(facts(tokens), implementation, tokens, _shapes)
    found: Tensor | tuple[Tensor, Tensor] = function(tokens, kept, positions, prefix, cu_seqlens=cu_seqlens)
    return found
