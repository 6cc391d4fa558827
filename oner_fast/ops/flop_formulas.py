"""FLOP formulas of the raw ops for `torch.utils.flop_counter.FlopCounterMode`: matrix products, two for a multiply-add.

The rules are those of PyTorch for its own fused attention: products that backward recomputes count, and a causal mask
subtracts nothing. Zeros that pad a tile are not counted. Each library of `ops.library` has its own formulas, because
Triton's backward passes recompute more: a program writes only the tile that it owns.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_COUNTER = "torch.utils.flop_counter"


def _score_flops(query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> int:
    """Count Q K^T over all sequences; fake and meta tensors count as sequences of equal length."""
    tokens, heads, width = query.shape
    if isinstance(cu_seqlens_q, FakeTensor) or cu_seqlens_q.device.type == "meta":
        pairs = tokens * key.shape[0] // max(cu_seqlens_q.shape[0] - 1, 1)
    else:
        lengths_q = cu_seqlens_q.long().diff()
        lengths_k = lengths_q if cu_seqlens_k is None else cu_seqlens_k.long().diff()
        pairs = int((lengths_q * lengths_k).sum())
    return 2 * pairs * heads * width


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, *rest: Any, **out: Any
) -> int:
    """Count the scores and the weighted sum of values."""
    return 2 * _score_flops(query, key, cu_seqlens_q, cu_seqlens_k)


def _varlen_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None, causal: bool, scale: float, need_query: bool, need_key: bool, *rest: Any,
    **results: Any,
) -> int:  # fmt: skip
    """Count the scores again, then the gradients of scores, query, key and value."""
    return (2 + need_query + 2 * need_key) * _score_flops(query, key, cu_seqlens_q, cu_seqlens_k)


def _varlen_attention_backward_in_triton(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None, causal: bool, scale: float, need_query: bool, need_key: bool, *rest: Any,
    **results: Any,
) -> int:  # fmt: skip
    """Count both kernels, each of which computes the scores and their gradient.

    That makes three products for query, and four for key and value.
    """
    return (3 * need_query + 4 * need_key) * _score_flops(query, key, cu_seqlens_q, cu_seqlens_k)


def _padded_score_flops(query: Tensor, key: Tensor, seen: Tensor | None) -> int:
    """Count Q K^T over the keys that are no padding; fake and meta tensors count all keys."""
    batch, rows, heads, width = query.shape
    pairs = batch * rows * key.shape[1]
    if seen is not None and not isinstance(seen, FakeTensor) and seen.device.type != "meta" and rows:
        pairs = rows * int((seen if seen.ndim == 1 else seen[:, -1]).sum())
    return 2 * pairs * heads * width


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, *rest: Any, **out: Any
) -> int:  # fmt: skip
    """Count the scores and the weighted sum of values."""
    return 2 * _padded_score_flops(query, key, seen)


def _padded_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor, seen: Tensor | None,
    scale: float, need_query: bool, need_key: bool, *rest: Any, **results: Any,
) -> int:  # fmt: skip
    """Count as for packed sequences."""
    return (2 + need_query + 2 * need_key) * _padded_score_flops(query, key, seen)


def _padded_attention_backward_in_triton(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor, seen: Tensor | None,
    scale: float, need_query: bool, need_key: bool, *rest: Any, **results: Any,
) -> int:  # fmt: skip
    """Count as for packed sequences."""
    return (3 * need_query + 4 * need_key) * _padded_score_flops(query, key, seen)


def _mixup_info_nce_statistics(
    query: Tensor, query_other: Tensor | None, query_mix: Tensor | None, query_norm: Tensor | None, key: Tensor,
    *rest: Any, **out: Any,
) -> int:  # fmt: skip
    """Count the logits."""
    return 2 * query.shape[0] * key.shape[0] * query.shape[1]


def _mixup_info_nce_backward(
    query: Tensor, query_other: Tensor | None, query_mix: Tensor | None, query_norm: Tensor | None, key: Tensor,
    *rest: Any, **out: Any,
) -> int:  # fmt: skip
    """Count the logits again, then the gradient of query and, where wanted, that of key."""
    need_key = bool(rest[12])
    return (2 + need_key) * 2 * query.shape[0] * key.shape[0] * query.shape[1]


def _mixup_info_nce_backward_in_triton(
    query: Tensor, query_other: Tensor | None, query_mix: Tensor | None, query_norm: Tensor | None, key: Tensor,
    key_other: Tensor | None, *rest: Any, **out: Any,
) -> int:  # fmt: skip
    """Count two products a side where each side recomputes the logits; wider rows recompute them once."""
    from oner_fast.kernels.mixup_info_nce_backward import keeps_tiles

    need_key = bool(rest[11])
    mixed = query_other is not None or key_other is not None
    again = need_key and keeps_tiles(query, mixed, atomic=False)
    return (2 + need_key + again) * 2 * query.shape[0] * key.shape[0] * query.shape[1]


def _sigmoid_loss_backward(
    query: Tensor, query_other: Tensor | None, query_mix: Tensor | None, query_norm: Tensor | None, key: Tensor,
    *rest: Any, **out: Any,
) -> int:  # fmt: skip
    """Count the logits again, then the gradient of query and, where wanted, that of key."""
    need_key = bool(rest[9])
    return (2 + need_key) * 2 * query.shape[0] * key.shape[0] * query.shape[1]


def _sigmoid_loss_backward_in_triton(
    query: Tensor, query_other: Tensor | None, query_mix: Tensor | None, query_norm: Tensor | None, key: Tensor,
    key_other: Tensor | None, *rest: Any, **out: Any,
) -> int:  # fmt: skip
    """Count two products a side where each side recomputes the logits; wider rows recompute them once."""
    from oner_fast.kernels.mixup_info_nce_backward import keeps_tiles

    need_key = bool(rest[8])
    mixed = query_other is not None or key_other is not None
    again = need_key and keeps_tiles(query, mixed, atomic=False)
    return (2 + need_key + again) * 2 * query.shape[0] * key.shape[0] * query.shape[1]


def register() -> None:
    """Register the formulas, now or when the module of FlopCounterMode is imported; call once, after the ops exist.

    That module imports Triton where it is installed, a cost that `import oner_fast` must not have.
    """
    if counter := sys.modules.get(_COUNTER):
        _register_with(counter)
    else:
        sys.meta_path.insert(0, _WhenImported())


def _register_with(counter: ModuleType) -> None:
    compiled, triton, atomic = torch.ops.oner_fast, torch.ops.oner_fast_triton, torch.ops.oner_fast_triton_atomic
    for name, formula, libraries in (
        ("varlen_attention", _varlen_attention, (compiled, triton, atomic)),
        ("varlen_attention_backward", _varlen_attention_backward, (compiled,)),
        ("varlen_attention_backward", _varlen_attention_backward_in_triton, (triton, atomic)),
        ("padded_attention", _padded_attention, (compiled, triton, atomic)),
        ("padded_attention_backward", _padded_attention_backward, (compiled,)),
        ("padded_attention_backward", _padded_attention_backward_in_triton, (triton, atomic)),
        ("mixup_info_nce_statistics", _mixup_info_nce_statistics, (compiled, triton, atomic)),
        # Gradients of keys that are added atomically need no second computation of the logits.
        ("mixup_info_nce_backward", _mixup_info_nce_backward, (compiled, atomic)),
        ("mixup_info_nce_backward", _mixup_info_nce_backward_in_triton, (triton,)),
        ("sigmoid_loss_sums", _mixup_info_nce_statistics, (compiled, triton, atomic)),
        ("sigmoid_loss_backward", _sigmoid_loss_backward, (compiled,)),
        ("sigmoid_loss_backward", _sigmoid_loss_backward_in_triton, (triton, atomic)),
    ):
        raw_ops = [getattr(library, name) for library in libraries]
        counter.register_flop_formula(raw_ops, get_raw=True)(formula)


class _WhenImported(MetaPathFinder):
    """An import hook that registers the formulas after the counter is imported, then removes itself."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_with(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
