"""Packed attention by flash-attn 2 and 3 and by xFormers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from oner_fast.benchmarks.cases import Call, Contender, Result
from oner_fast.doctor import find_peer


def contenders(lengths: list[int], dtype: torch.dtype) -> list[Contender]:
    """List the installed packages that attend within packed sequences of `lengths`, in `dtype`."""
    found = []
    longest = max(lengths)
    if dtype in (torch.float16, torch.bfloat16):
        for name, module, distribution in (
            ("flash-attn", "flash_attn", "flash-attn"),
            ("flash-attn 3", "flash_attn_interface", "flash_attn_3"),
        ):
            if find_peer(module, distribution):
                forward = partial(flash, module=module, longest=longest)
                found.append(Contender(f"eager {name}", forward, devices=("cuda",)))
    if find_peer("xformers", "xformers"):
        name = "eager xFormers memory_efficient_attention"
        found.append(Contender(name, memory_efficient, blocks_of(lengths), _of_one, devices=("cuda",)))
    return found


def flash(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, module: str, longest: int) -> Tensor:
    """Attend to packed (T, H, Dh) by flash-attn's function for sequences of different lengths."""
    package = importlib.import_module(module)
    found = package.flash_attn_varlen_func(query, key, value, boundaries, boundaries, longest, longest)
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result


def blocks_of(lengths: list[int]) -> Callable[[Call], Call]:
    """Make the layout of xFormers: (1, T, H, Dh), and a mask that is made of the lengths beforehand."""

    def layout(call: Call) -> Call:
        leaves = tuple(one.detach().unsqueeze(0).requires_grad_() for one in call.arguments[:3])
        mask: Any = importlib.import_module("xformers.ops.fmha.attn_bias").BlockDiagonalMask.from_seqlens(lengths)
        return Call((*leaves, mask), leaves, (call.upstream[0].unsqueeze(0),))

    return layout


def memory_efficient(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """Attend by xFormers' memory-efficient attention."""
    package = importlib.import_module("xformers.ops")
    result: Tensor = package.memory_efficient_attention(query, key, value, attn_bias=mask)
    return result


def _of_one(results: Result) -> Result:
    return tuple(one.squeeze(0) for one in results)
