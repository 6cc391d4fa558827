"""padded_attention: attention of a padded batch (B, H, N, Dh) that reads and computes no padded key."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.ops import attention_checks, attention_dropout, batching, checks, reference
from oner_fast.ops.attention_backends import why_no_dropout
from oner_fast.ops.attention_facts import autocast_dtype, why_not_triton
from oner_fast.ops.implementations import Facts, register
from oner_fast.ops.library import define, raw_ops
from oner_fast.ops.masked_gather import masked_gather
from oner_fast.ops.serve import serve
from oner_fast.ops.transforms import Values, differentiable
from oner_fast.ops.values import readable


def _fold(
    op: Any,
    size: int,
    batched: batching.Flags,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scale: float,
    dropped: int = 0,
    dropout_seed: Tensor | None = None,
) -> batching.Results | None:
    """Take the batch as further samples; dropout counts the samples of each element from 0, in a loop."""
    if dropped:
        return None
    query, key, value = (batching.rows(x, own, size) for x, own in zip((query, key, value), batched[:3], strict=True))
    seen = None if seen is None else batching.rows(seen, batched[3], size)
    out, statistics = op(query, key, value, seen, scale)
    return batching.elements(out, size), batching.elements(statistics, size, 1)


def _fold_backward(
    op: Any,
    size: int,
    batched: batching.Flags,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    seen: Tensor | None,
    scale: float,
    need_query: bool,
    need_key: bool,
    dropped: int = 0,
    dropout_seed: Tensor | None = None,
) -> batching.Results | None:
    if dropped:
        return None
    tensors = zip((grad, query, key, value, out), batched[:5], strict=True)
    grad, query, key, value, out = (batching.rows(x, own, size) for x, own in tensors)
    every = statistics if batched[5] else statistics.expand(size, *statistics.shape)
    statistics = every.movedim(0, 1).flatten(1, 2).contiguous()
    seen = None if seen is None else batching.rows(seen, batched[6], size)
    found = op(grad, query, key, value, out, statistics, seen, scale, need_query, need_key)
    return tuple(batching.elements(x, size) if x.ndim == 4 else x.expand(size, 0) for x in found)


# Rows come before heads, as projections write them. `seen` says how many keys, from the first on, the queries of a
# sample see: (B,), or (B, N) for each query, where no query sees fewer than the one before it. None: all keys.
@define(
    "padded_attention(Tensor query, Tensor key, Tensor value, Tensor? seen, float scale, int dropped=0, "
    "Tensor? dropout_seed=None) -> (Tensor, Tensor)",
    triton="padded_attention.forward",
    portable=True,
    fold=_fold,
)
def _forward_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scale: float,
    dropped: int = 0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty((2, *query.shape[:3]), dtype=statistics_dtype(query))


@define(
    "padded_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor statistics, "
    "Tensor? seen, float scale, bool need_query, bool need_key, int dropped=0, Tensor? dropout_seed=None) "
    "-> (Tensor, Tensor, Tensor)",
    triton="padded_attention.backward",
    portable=True,
    fold=_fold_backward,
)
def _backward_shape(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    statistics: Tensor,
    seen: Tensor | None,
    scale: float,
    need_query: bool,
    need_key: bool,
    dropped: int = 0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape if need_query else (0,)),
        key.new_empty(key.shape if need_key else (0,)),
        value.new_empty(value.shape if need_key else (0,)),
    )


class _PaddedAttention:
    """The result and its gradients.

    Saved are the inputs, the result, for each query and head its largest score and 1 / the sum of its weights, and how
    many keys are seen.
    """

    @staticmethod
    def compute(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor | None,
        scale: float,
        dropped: int,
        dropout_seed: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        out, statistics = raw_ops(backend).padded_attention(query, key, value, seen, scale, dropped, dropout_seed)
        return out, statistics

    @staticmethod
    def remember(ctx: Any, arguments: Values, results: Values) -> None:
        query, key, value, seen, ctx.scale, ctx.dropped, seed, ctx.backend = arguments
        ctx.save_for_backward(query, key, value, *results, seen, seed)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_query, need_key, need_value = ctx.needs_input_grad[:3]
        *saved, seed = ctx.saved_tensors
        to_query, to_key, to_value = raw_ops(ctx.backend).padded_attention_backward(
            grad, *saved, ctx.scale, need_query, need_key or need_value, ctx.dropped, seed
        )
        return (
            to_query if need_query else None,
            to_key if need_key else None,
            to_value if need_value else None,
            *(None,) * 5,
        )


_padded_attention = differentiable("padded_attention", _PaddedAttention)


def facts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
) -> Facts:
    """Return the facts of a call with these arguments, by which its implementation is chosen; nothing is computed."""
    known = {
        "dtype": autocast_dtype(query) or query.dtype, "causal": causal, "scale": scale, "dropout_p": dropout_p,
    }  # fmt: skip
    if query.ndim == 4:
        known["head_dim"] = query.shape[3]
    return "padded_attention", query.device.type, known


def padded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute softmax(scale Q K^T) V for a padded batch, over the keys that are no padding.

    A query that sees no key gives 0 and takes no gradient. What padded keys and values hold changes nothing, NaN
    included, and their gradients are 0. Under autocast, query, key and value are cast to the autocast dtype, except for
    a float64 query.

    Args:
        query: (B, H, N, Dh) float32, float16, bfloat16 or float64, with any strides.
        key: (B, Hk, Nk, Dh) in the dtype of the query, where Hk divides H (grouped queries).
        value: (B, Hk, Nk, Dh) in the dtype of the query.
        key_lengths: (B,) int32 or int64 in [0, Nk]: the keys of a sample are its first ones, and the rest is padding.
            No key is copied.
        key_mask: (B, Nk) bool, True where a key is attended to. On the CPU, a mask that is True up to some length is
            taken as that length. Any other mask, and every mask on a GPU, whose values are not read, has the keys and
            values copied, the attended ones first.
        causal: mask the keys behind each query, with N queries and Nk keys, padding included, aligned at their ends.
        scale: the factor of the scores, Dh**-0.5 by default.
        dropout_p: the share of weights that are dropped after the softmax, in [0, 1), rounded to a multiple of 2^-16.
            The others are divided by the share that is kept.
        dropout_seed: an int in [0, 2^64) or a 0-d int64 tensor. Every implementation drops the same weights for a seed,
            and so does `varlen_attention` of the same sequences without their padding. By default, each call draws a
            seed from the device's generator, which `torch.manual_seed` sets.
        implementation: force one by name; see `oner_fast.ops.implementations`.

    Returns:
        (B, H, N, Dh) in the dtype of the query. In memory the heads of a row lie side by side, as in (B, N, H, Dh).

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit, both lengths and a mask are given, or a length is out of range. On
            CUDA, lengths are checked only with `ONER_FAST_DEBUG=1`.
        RuntimeError: the forced implementation cannot run this call.
    """
    op = "padded_attention"
    checks.is_tensor(op, "query", query)
    attention_checks.options(op, causal, scale)
    if (dtype := autocast_dtype(query)) is not None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            checks.floating(op, name, checks.is_tensor(op, name, x))
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    seed = attention_dropout.seed_of(op, dropout_p, dropout_seed, query)
    options: dict[str, Any] = {"key_lengths": key_lengths, "key_mask": key_mask, "causal": causal, "scale": scale}
    if seed is not None:
        options |= {"dropout_p": dropout_p, "dropout_seed": seed}
    known = facts(query, key, value, **options)
    out: Tensor = serve(known, implementation, query, _shapes)(query, key, value, **options)
    return out


def _is_prefix(key_mask: Tensor) -> bool:
    """Return whether the mask is known to be True up to some length in every sample."""
    known = readable(key_mask)
    return known is not None and not bool((known[..., 1:] > known[..., :-1]).any())


def _attended_first(key: Tensor, value: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Copy keys and values (B, Nk, Hk, Dh) with those that are attended to in front, in their order."""
    order = key_mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    key, value = (masked_gather(x.flatten(2), order).unflatten(2, x.shape[2:]) for x in (key, value))  # type: ignore[union-attr]
    return key, value


def _seen(
    rows: int, keys: int, key_lengths: Tensor | None, key_mask: Tensor | None, causal: bool, like: Tensor
) -> Tensor | None:
    """Return how many keys are seen, of those in front that are no padding: (B,), (B, N) or None for all."""
    if not causal:
        if key_mask is not None:
            return key_mask.sum(1, dtype=torch.int32)
        return None if key_lengths is None else key_lengths.to(torch.int32)
    until = (torch.arange(rows, device=like.device) + (keys - rows + 1)).clamp(0, keys)  # in the padded batch
    if key_mask is not None:
        return F.pad(key_mask.cumsum(1, dtype=torch.int32), (1, 0)).index_select(1, until)
    until = until.to(torch.int32)
    if key_lengths is not None:
        return torch.minimum(until, key_lengths.to(torch.int32).unsqueeze(1))
    return until.expand(like.shape[0], rows)


def _compiled(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """Call the flash kernels of csrc/cpu ("cpp") or of kernels/ ("triton"), or plain PyTorch in parts ("portable")."""
    attention_checks.padded(query, key, value, key_lengths, key_mask, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    seen = _seen(query.shape[2], key.shape[2], key_lengths, key_mask, causal, query)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if key_mask is not None and not _is_prefix(key_mask):
        key, value = _attended_first(key, value, key_mask)
    dropped = 0 if dropout_seed is None else attention_dropout.level(dropout_p)
    out: Tensor = _padded_attention(query, key, value, seen, scale, dropped, dropout_seed, backend)
    return out.transpose(1, 2)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Call PyTorch's fused attention with a mask. Padding is computed, with zeros in its place."""
    attention_checks.padded(query, key, value, key_lengths, key_mask, scale)
    (batch, heads, rows, _), keys, dtype = query.shape, key.shape[2], query.dtype
    if key_lengths is not None:
        key_mask = torch.arange(keys, device=key.device) < key_lengths.unsqueeze(1)
    seen = blind = None
    if key_mask is not None:
        seen = key_mask.view(batch, 1, 1, keys)
        key, value = (x.masked_fill(~key_mask.view(batch, 1, keys, 1), 0.0) for x in (key, value))
    if causal:
        until = torch.ones(rows, keys, dtype=torch.bool, device=key.device).tril(keys - rows)
        seen = until if seen is None else seen & until
    if seen is not None:
        blind = ~seen.any(-1, keepdim=True)
        seen = (seen | blind).expand(-1, heads, rows, -1) if seen.ndim == 4 else seen | blind
    if scale is not None and scale <= 0:  # PyTorch's kernels mask scores before they scale them
        query, scale = query * scale, 1.0
    # Half-precision flash attention on the CPU is slower than its float32 one at these lengths.
    if query.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    if keys == 0:
        nothing = key.sum() + value.sum()  # so that keys and values have their empty gradients
        return (query.masked_fill(torch.ones_like(query, dtype=torch.bool), 0) + nothing).to(dtype)
    with torch.autocast(query.device.type, enabled=False):
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scale, enable_gqa=heads != key.shape[1]
        )
    return (out if blind is None else out.masked_fill(blind, 0.0)).to(dtype)


_shapes = partial(_compiled, "cpp")
register("padded_attention", "reference", reference.padded_attention, preference=-10)
register("padded_attention", "portable", partial(_compiled, "portable"))
register("padded_attention", "sdpa", _sdpa, preference=10, reasons=why_no_dropout)
register("padded_attention", "cpp", partial(_compiled, "cpp"), devices=("cpu",), preference=100, compiled=True)
register(
    "padded_attention", "triton", partial(_compiled, "triton"), devices=("cuda",), on_request=("cpu",), preference=50,
    reasons=why_not_triton,
)  # fmt: skip
