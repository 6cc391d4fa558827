"""varlen_attention: attention within the sequences of a packed batch, plain, cross (OneR's F(Q|C)) or causal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.ops import attention_backends as backends
from oner_fast.ops import attention_checks, attention_dropout, batching, checks, reference, short_attention
from oner_fast.ops.attention_backends import why_no_dropout
from oner_fast.ops.attention_facts import autocast_dtype, why_not_triton
from oner_fast.ops.by_length import attend_by_length
from oner_fast.ops.implementations import Facts, register
from oner_fast.ops.library import define, raw_ops
from oner_fast.ops.serve import serve
from oner_fast.ops.transforms import Values, differentiable


def _fold(
    op: Any,
    size: int,
    batched: batching.Flags,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    dropped: int = 0,
    dropout_seed: Tensor | None = None,
) -> batching.Results | None:
    """Take the batch as further sequences; dropout counts the sequences of each element from 0, in a loop."""
    if dropped:
        return None
    query, key, value = (batching.rows(x, own, size) for x, own in zip((query, key, value), batched[:3], strict=True))
    ends = _joined(size, batched[3:5], cu_seqlens_q, cu_seqlens_k, query, key)
    out, statistics = op(query, key, value, *ends, causal, scale)
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
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
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
    ends = _joined(size, batched[6:8], cu_seqlens_q, cu_seqlens_k, query, key)
    found = op(grad, query, key, value, out, statistics, *ends, causal, scale, need_query, need_key)
    return tuple(batching.elements(x, size) if x.ndim == 3 else x.expand(size, 0) for x in found)


def _joined(
    size: int, own: batching.Flags, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Join the boundaries of the elements of a batch, whose `query` and `key` are joined already."""
    of_query = batching.boundaries(cu_seqlens_q, own[0], size, query.shape[0] // size)
    if cu_seqlens_k is None:
        return of_query, None
    return of_query, batching.boundaries(cu_seqlens_k, own[1], size, key.shape[0] // size)


_LARGEST_MASK = 1 << 20  # numbers of a mask of unequal lengths; beyond, the queries are padded


@define(
    "varlen_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, "
    "float scale, int dropped=0, Tensor? dropout_seed=None) -> (Tensor, Tensor)",
    triton="varlen_attention.forward",
    portable=True,
    fold=_fold,
)
def _forward_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    dropped: int = 0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(query)
    return query.new_empty(query.shape), query.new_empty((2, *query.shape[:2]), dtype=dtype)


@define(
    "varlen_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor statistics, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, float scale, bool need_query, "
    "bool need_key, int dropped=0, Tensor? dropout_seed=None) -> (Tensor, Tensor, Tensor)",
    triton="varlen_attention_backward.backward",
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
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
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


class _VarlenAttention:
    """The result and its gradients.

    Saved are the inputs, the result, for each query and head its largest score and 1 / the sum of its weights, and the
    seed of dropout.
    """

    @staticmethod
    def compute(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None,
        causal: bool,
        scale: float,
        dropped: int,
        dropout_seed: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        out, statistics = raw_ops(backend).varlen_attention(
            query, key, value, cu_seqlens_q, cu_seqlens_k, causal, scale, dropped, dropout_seed
        )
        return out, statistics

    @staticmethod
    def remember(ctx: Any, arguments: Values, results: Values) -> None:
        query, key, value, cu_seqlens_q, cu_seqlens_k, ctx.causal, ctx.scale, ctx.dropped, seed, ctx.backend = arguments
        ctx.save_for_backward(query, key, value, *results, cu_seqlens_q, cu_seqlens_k, seed)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_query, need_key, need_value = ctx.needs_input_grad[:3]
        *saved, seed = ctx.saved_tensors
        to_query, to_key, to_value = raw_ops(ctx.backend).varlen_attention_backward(
            grad, *saved, ctx.causal, ctx.scale, need_query, need_key or need_value, ctx.dropped, seed
        )
        return (
            to_query if need_query else None,
            to_key if need_key else None,
            to_value if need_value else None,
            *(None,) * 7,
        )


_varlen_attention = differentiable("varlen_attention", _VarlenAttention)


def facts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
) -> Facts:
    """Return the facts of a call with these arguments, by which its implementation is chosen; nothing is computed."""
    leaves = [x for x in (query, key, value) if isinstance(x, Tensor)]
    known = {
        "dtype": autocast_dtype(query) or query.dtype, "causal": causal, "scale": scale, "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_q if cu_seqlens_k is None else max_seqlen_k,
        "needs_grad": torch.is_grad_enabled() and any(x.requires_grad for x in leaves), "dropout_p": dropout_p,
    }  # fmt: skip
    if query.ndim == 3:
        known["head_dim"] = query.shape[2]
        sized = isinstance(key, Tensor) and not key.is_nested and key.ndim == 3
        known["grouped"] = sized and key.shape[1] != query.shape[1]
    return "varlen_attention", query.device.type, known


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Compute softmax(scale Q K^T) V, where sequence i of the query attends to sequence i of the key.

    Sequences may be empty. A query that sees no key gives 0 and takes no gradient. Under autocast, query, key and value
    are cast to the autocast dtype, except for a float64 query.

    Args:
        query: (T, H, Dh) float32, float16, bfloat16 or float64.
        key: (Tk, Hk, Dh) in the dtype of the query, where Hk divides H (grouped queries).
        value: (Tk, Hk, Dh) in the dtype of the query.
        cu_seqlens_q: (S + 1,) int32 or int64, the boundaries of the query's sequences, from 0 to T.
        cu_seqlens_k: (S + 1,) int32 or int64, those of key and value, from 0 to Tk. The default is `cu_seqlens_q`.
        max_seqlen_q: an upper bound of the query's lengths. Some implementations run only where it is given.
        max_seqlen_k: an upper bound of the key's lengths. The default, without `cu_seqlens_k`, is `max_seqlen_q`.
        causal: mask the keys behind each query, with both sequences aligned at their ends.
        scale: the factor of the scores, Dh**-0.5 by default.
        dropout_p: the share of weights that are dropped after the softmax, in [0, 1), rounded to a multiple of 2^-16.
            The others are divided by the share that is kept.
        dropout_seed: an int in [0, 2^64) or a 0-d int64 tensor. Every implementation drops the same weights for a seed.
            By default, each call draws a seed from the device's generator, which `torch.manual_seed` sets.
        implementation: force one by name; see `oner_fast.ops.implementations`.

    Returns:
        (T, H, Dh) in the dtype of the query.

    Raises:
        TypeError: a dtype does not fit, or an argument is no tensor.
        ValueError: a shape or device does not fit, or boundaries do not describe the tensors. On CUDA, the values of
            boundaries are checked only with `ONER_FAST_DEBUG=1`.
        RuntimeError: the forced implementation cannot run this call.
    """
    checks.is_tensor("varlen_attention", "query", query)
    attention_checks.options("varlen_attention", causal, scale, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    if (dtype := autocast_dtype(query)) is not None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            checks.floating("varlen_attention", name, checks.is_tensor("varlen_attention", name, x))
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    cu_seqlens_q = checks.as_int32("varlen_attention", "cu_seqlens_q", cu_seqlens_q)
    cu_seqlens_k = checks.as_int32("varlen_attention", "cu_seqlens_k", cu_seqlens_k)
    seed = attention_dropout.seed_of("varlen_attention", dropout_p, dropout_seed, query)
    # What cannot drop weights need not take the arguments: nothing is passed where nothing is dropped.
    dropout: dict[str, Any] = {} if seed is None else {"dropout_p": dropout_p, "dropout_seed": seed}
    options: dict[str, Any] = {
        "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "causal": causal, "scale": scale, **dropout,
    }  # fmt: skip
    known = facts(query, key, value, cu_seqlens_q, cu_seqlens_k, **options)
    serving = serve(known, implementation, query, _shapes, _READING)
    out: Tensor = serving(query, key, value, cu_seqlens_q, cu_seqlens_k, **options)
    return out


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Call PyTorch's fused attention once for each pair of lengths."""
    attention_checks.varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, scale)

    def attend(q: Tensor, k: Tensor, v: Tensor, sequences: tuple[int, ...]) -> Tensor:
        return _aligned_at_the_end(call, q, k, v) if causal else call(q, k, v)

    if causal and scale is not None and scale <= 0:  # PyTorch's kernels mask scores before they scale them
        query, scale = query * scale, 1.0
    call = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    # Half-precision flash attention on the CPU is slower than its float32 one at these lengths.
    dtype = query.dtype
    if query.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    with torch.autocast(query.device.type, enabled=False):
        return attend_by_length(attend, query, key, value, cu_seqlens_q, cu_seqlens_k).to(dtype)


def _aligned_at_the_end(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention aligned at the ends of q (n, H, Lq, Dh) and k (n, Hk, Lk, Dh).

    PyTorch aligns at the starts, so that lengths must be made equal where a mask would be too large.
    """
    blind, early = max(q.shape[2] - k.shape[2], 0), max(k.shape[2] - q.shape[2], 0)
    q = q[:, :, blind:]  # earlier queries see no key
    lq, lk = q.shape[2], k.shape[2]
    if early and lq * lk <= _LARGEST_MASK:
        out = call(q, k, v, attn_mask=torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(early))
    else:
        out = call(F.pad(q, (0, 0, early, 0)), k, v, is_causal=True)[:, :, early:]
    return F.pad(out, (0, 0, blind, 0))


def _compiled(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """Call the flash kernels of csrc/cpu ("cpp") or of kernels/ ("triton"), or plain PyTorch in parts ("portable")."""
    attention_checks.varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    dropped = 0 if dropout_seed is None else attention_dropout.level(dropout_p)
    out: Tensor = _varlen_attention(
        query, key, value, cu_seqlens_q, cu_seqlens_k, causal, scale, dropped, dropout_seed, backend
    )
    return out


def _register_on_gpus(name: str, function: Any, preference: int, reasons: Any, **more: Any) -> None:
    register("varlen_attention", name, function, devices=("cuda",), preference=preference, reasons=reasons, **more)


_shapes = partial(_compiled, "cpp")
_READING = ("reference", "sdpa", "xformers")  # they read the lengths
register("varlen_attention", "reference", reference.varlen_attention, preference=-10)
register("varlen_attention", "portable", partial(_compiled, "portable"))
register("varlen_attention", "sdpa", _sdpa, preference=10, reasons=why_no_dropout)
register("varlen_attention", "cpp", partial(_compiled, "cpp"), devices=("cpu",), preference=100, compiled=True)
# docs/implementations.md gives the reasons for this order.
_register_on_gpus("flash_attn_3", backends.flash_attn_3, 60, backends.why_not_flash_attn_3)
_register_on_gpus("cuda", short_attention.attend, 55, short_attention.why_not, compiled=True)
_register_on_gpus("triton", partial(_compiled, "triton"), 50, why_not_triton, on_request=("cpu",))
_register_on_gpus("flash_attn", backends.flash_attn, 40, backends.why_not_flash_attn)
_register_on_gpus("torch_varlen", backends.torch_varlen, 30, backends.why_not_torch_varlen)
_register_on_gpus("xformers", backends.xformers, 20, backends.why_not_xformers)
