"""varlen_attention in CUDA C++ for sequences of at most 256 tokens, which is all of OneR and UTA at 224 pixels.

A table of tasks, longest first, is made once for all layers of a step; see `csrc/cuda/short_attention.cuh`.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from oner_fast.ops import attention_backends, attention_checks, library
from oner_fast.ops.library import define
from oner_fast.ops.transforms import Values, differentiable

MOST_TOKENS = 256
HEAD_DIMS = (32, 64)
_ROOMY = (8, 9, 10)  # major compute capabilities with GPUs whose blocks may have the 163 KiB of the longest sequence
_KEPT_TABLES = 8  # of the boundaries of one step


@define(
    "short_attention_table(Tensor cu_seqlens_q, Tensor? cu_seqlens_k, int queries, int keys, int heads, int longest) "
    "-> Tensor"
)
def _table_shape(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, queries: int, keys: int, heads: int, longest: int
) -> Tensor:
    return cu_seqlens_q.new_empty((2 + 2 * (cu_seqlens_q.shape[0] - 1) * heads,))


@define(
    "short_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, Tensor table, "
    "int longest, bool causal, float scale) -> (Tensor, Tensor)"
)
def _forward_shape(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, table: Tensor,
    longest: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), query.new_empty((2, *query.shape[:2]), dtype=torch.float32)


@define(
    "short_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor statistics, "
    "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, Tensor table, int longest, bool causal, float scale, bool need_query, "
    "bool need_key) -> (Tensor, Tensor, Tensor)"
)
def _backward_shape(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None, table: Tensor, longest: int, causal: bool, scale: float, need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        query.new_empty(query.shape if need_query else (0,)),
        key.new_empty(key.shape if need_key else (0,)),
        value.new_empty(value.shape if need_key else (0,)),
    )


class _ShortAttention:
    """The result and its gradients, as those of `varlen_attention`."""

    @staticmethod
    def compute(
        query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, table: Tensor,
        longest: int, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, statistics = torch.ops.oner_fast.short_attention(
            query, key, value, cu_seqlens_q, cu_seqlens_k, table, longest, causal, scale
        )
        return out, statistics

    @staticmethod
    def remember(ctx: Any, arguments: Values, results: Values) -> None:
        *tensors, ctx.longest, ctx.causal, ctx.scale = arguments
        ctx.save_for_backward(*tensors[:3], *results, *tensors[3:])

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_query, need_key, need_value = ctx.needs_input_grad[:3]
        to_query, to_key, to_value = torch.ops.oner_fast.short_attention_backward(
            grad, *ctx.saved_tensors, ctx.longest, ctx.causal, ctx.scale, need_query, need_key or need_value
        )
        return (
            to_query if need_query else None,
            to_key if need_key else None,
            to_value if need_value else None,
            *(None,) * 6,
        )


_short_attention = differentiable("varlen_attention", _ShortAttention)

_Key = tuple[Any, ...]
_tables: OrderedDict[_Key, tuple[tuple[weakref.ref[Tensor], ...], Tensor]] = OrderedDict()


def table_of(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, queries: int, keys: int, heads: int, longest: int
) -> Tensor:
    """Return the table of tasks of these boundaries, from the last few that were made or by a launch.

    A table is kept for the very tensors, unchanged, and for the stream that made it. While a graph is traced or
    captured, the graph makes it, so that a replay has the table of its own boundaries.
    """
    make = torch.ops.oner_fast.short_attention_table
    arguments = (cu_seqlens_q, cu_seqlens_k, queries, keys, heads, longest)
    given = [each for each in (cu_seqlens_q, cu_seqlens_k) if each is not None]
    if torch.compiler.is_compiling() or not cu_seqlens_q.is_cuda or any(each.is_inference() for each in given):
        return make(*arguments)
    if torch.cuda.is_current_stream_capturing():
        return make(*arguments)
    stream = torch.cuda.current_stream(cu_seqlens_q.device).cuda_stream
    key = (*((id(each), each._version) for each in given), *arguments[2:], stream)
    found = _tables.get(key)
    if found is not None and all(one() is each for one, each in zip(found[0], given, strict=True)):
        return found[1]
    table: Tensor = make(*arguments)
    _tables[key] = (tuple(map(weakref.ref, given)), table)
    _tables.move_to_end(key)
    if len(_tables) > _KEPT_TABLES:
        _tables.popitem(last=False)
    return table


def why_not(device: str, **facts: Any) -> list[str]:
    """List every reason why CUDA C++ cannot take a call of `varlen_attention` on `device` with these facts."""
    found = library.why_not_cuda("short_attention")(device)
    capability = attention_backends._capability() if device == "cuda" else None
    if capability is not None and (capability[0] not in _ROOMY or capability in ((8, 6), (8, 9))):
        found.append(f"a block of sm_{capability[0]}{capability[1]} has no room for the rows of a sequence")
    found += attention_backends.why_no_dropout(**facts)
    if facts.get("dtype") not in (None, *attention_backends.HALF):
        found.append(f"takes float16 and bfloat16, not {facts['dtype']}")
    if facts.get("head_dim") not in (None, *HEAD_DIMS):
        found.append(f"takes head dimensions of 32 and 64, not {facts['head_dim']}")
    if facts.get("grouped"):
        found.append("takes as many heads of key and value as of query")
    if facts.get("scale") is not None and not facts["scale"] > 0:
        found.append(f"takes the maximum before it scales: scale must be positive, got {facts['scale']}")
    for name in ("max_seqlen_q", "max_seqlen_k"):
        if name not in facts:
            continue
        if facts[name] is None:
            found.append(f"needs {name}= on the host, at most {MOST_TOKENS}")
        elif facts[name] > MOST_TOKENS:
            found.append(f"keeps whole sequences on the chip: {name} must be at most {MOST_TOKENS}, got {facts[name]}")
    return found


def attend(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attend with the kernels of csrc/cuda; arguments and result are those of `oner_fast.ops.varlen_attention`.

    A sequence longer than its bound gives NaN.
    """
    attention_checks.varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    longest = max(max_seqlen_q or 1, max_seqlen_k or 1)
    table = table_of(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0], query.shape[1], longest)
    out: Tensor = _short_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, table, longest, causal, scale)
    return out
