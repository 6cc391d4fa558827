"""`torch.nn.functional.scaled_dot_product_attention`, served by our attention where the two mean the same."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.integrations import dense_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention as PyTorch's function of this name does, with its arguments.

    Whatever our attention does not serve goes to PyTorch's, with one warning for each reason. TorchScript and tracers
    (`torch.fx`, `torch.jit.trace`, `torch.export`) get PyTorch's, so that their graphs do not need oner_fast.
    """
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    else:
        return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    traced = not all(isinstance(x, Tensor) for x in (query, key, value))
    if not traced:
        reason = _why_not(query, key, value, mask, causal, enable_gqa)
        if reason is None:
            if causal:  # PyTorch aligns at the starts
                key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            keys = None if mask is None else mask.expand(query.shape[0], 1, 1, key.shape[2])[:, 0, 0]
            return dense_attention.attend(
                query, key, value, key_mask=keys, causal=causal, scale=scale, dropout=dropout
            ).transpose(1, 2)
        dense_attention.leave_to_pytorch(reason)
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=enable_gqa)


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, enable_gqa: bool
) -> str | None:
    if (reason := dense_attention.why_not(query, key, value)) is not None:
        return reason
    if key.shape[1] != query.shape[1] and not enable_gqa:
        return "query and key differ in heads without enable_gqa"
    if causal and (mask is not None or key.shape[2] < query.shape[2]):
        return "a causal attention has a mask or fewer keys than queries"
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        return "its mask is an additive bias"
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
        return "its mask differs between queries or heads"
    return None


def with_our_attention(functional: ModuleType) -> ModuleType:
    """Return a copy of the module `torch.nn.functional` in which attention is ours."""
    copy = ModuleType(functional.__name__, functional.__doc__)
    copy.__dict__.update(vars(functional), scaled_dot_product_attention=scaled_dot_product_attention)
    return copy
