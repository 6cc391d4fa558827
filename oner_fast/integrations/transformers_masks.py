"""The masks that transformers' models hand to our attention.

transformers makes one mask a forward pass and gives it to every layer. Wherever the pattern allows it, ours holds one
number for each key instead of one for each pair of query and key. It has the four dimensions of a prepared mask,
(B, 1, 1, W), and the queries are the last of the W positions. The dtype says what the numbers mean.

| dtype | meaning |
|---|---|
| bool | keys that every query sees |
| uint8 | keys that are not hidden, each seen by itself and by what follows |
| int32 | the number of each position's sequence, within which it sees itself and what is before it |

`None` means that every query sees every key, or with a causal module itself and what is before it. Another pattern is
transformers' own boolean mask (B, 1, N, W), which only PyTorch's attention takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oner_fast.integrations.transformers_packing import unreadable
from oner_fast.models.optional_packages import optional_package

optional_package("transformers")
from transformers import masking_utils  # noqa: E402

KEYS, CAUSAL, SEQUENCES = torch.bool, torch.uint8, torch.int32


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """Return the mask of a forward pass: transformers' `AttentionMaskInterface` calls this.

    Args:
        batch_size: B.
        q_length: N, the queries of this call.
        kv_length: the keys, those of the cache included.
        q_offset: the position of the first query; a tensor where the cache is static.
        kv_offset: the position of the first key.
        mask_function: the pattern, as a function of two positions.
        attention_mask: (B, positions) bool, False where a position is padding.
        allow_is_causal_skip: None may stand for a causal pattern.
        allow_is_bidirectional_skip: None may stand for a pattern without hidden keys.
        device: where the mask is made.
        others: further arguments of transformers' own function.

    Returns:
        A mask as this module describes it, or None.
    """
    found: Tensor | None = None
    if q_length > 1 and kv_offset == 0 and not torch.jit.is_tracing():  # one query has one row of a mask anyway
        length = min(kv_length, _last(q_offset, q_length))
        if mask_function is masking_utils.bidirectional_mask_function and allow_is_bidirectional_skip:
            found = _padding(attention_mask, kv_length, KEYS)
            if found is None:
                return None
        elif mask_function is masking_utils.causal_mask_function and allow_is_causal_skip and length > 0:
            found = _padding(attention_mask, length, CAUSAL)
            if found is None and length == q_length:
                return None
            if found is None:
                found = torch.ones(batch_size, 1, 1, length, dtype=CAUSAL, device=device)
        elif (numbers := _sequence_numbers(mask_function)) is not None and q_length == kv_length:
            found = numbers.expand(batch_size, -1)[:, None, None].to(SEQUENCES)
    if found is not None:
        return found
    full: Tensor | None = masking_utils.sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, kv_offset=kv_offset,
        q_offset=q_offset,  # type: ignore[arg-type]  # a tensor where the cache is static
        mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip, device=device, **others,
    )  # fmt: skip
    return full


def _last(q_offset: int | Tensor, q_length: int) -> int:
    """Return the number of positions up to the last query, or 0 where it cannot be read."""
    if isinstance(q_offset, Tensor):
        if unreadable(q_offset):
            return 0
        q_offset = int(q_offset)
    return q_offset + q_length


def _padding(attention_mask: Tensor | None, length: int, dtype: torch.dtype) -> Tensor | None:
    """Return `attention_mask` as a mask of `length` keys, or None where it is known to hide none of them."""
    if attention_mask is None:
        return None
    mask = attention_mask[:, :length]
    if mask.shape[1] < length:
        mask = F.pad(mask, (0, length - mask.shape[1]))
    if not unreadable(mask) and bool(mask.all()):
        return None
    return mask[:, None, None].to(dtype)


def _sequence_numbers(mask_function: Callable[..., Any]) -> Tensor | None:
    """Return the (B, N) numbers of packed sequences from transformers' pattern for them, or None for another pattern.

    The pattern is a closure, which torch.compile cannot look into.
    """
    if torch.compiler.is_compiling():
        return None
    parts = _held(mask_function, "and_masks", "mask_functions")
    if parts is None or len(parts) != 2:
        return None
    of_order = _held(parts[0], "remap_positions_for_packed_sequence", "mask_function")
    if of_order is not masking_utils.causal_mask_function:
        return None
    numbers: Tensor | None = _held(parts[1], "packed_sequence_mask_function", "packed_sequence_mask")
    return numbers


def _held(function: Callable[..., Any], maker: str, name: str) -> Any:
    """Return the variable `name` that a function made by transformers' `maker` holds, or None for another function."""
    code = getattr(function, "__code__", None)
    if code is None or not function.__qualname__.startswith(f"{maker}.<locals>.") or name not in code.co_freevars:
        return None
    return function.__closure__[code.co_freevars.index(name)].cell_contents  # type: ignore[index]


def is_ours(mask: Tensor) -> bool:
    """Return whether a mask has one number a key."""
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
        return False
    return mask.dtype in (KEYS, CAUSAL, SEQUENCES)


def pairs(mask: Tensor, queries: int) -> Tensor:
    """Return the boolean mask (B, 1, N, W) of pairs that one of ours stands for, as PyTorch's attention takes it."""
    if mask.dtype == KEYS:
        return mask
    keys = torch.arange(mask.shape[3], device=mask.device)
    before = keys <= keys[mask.shape[3] - queries :, None]
    if mask.dtype == CAUSAL:
        return before & mask.bool()
    return before & (mask == mask[..., mask.shape[3] - queries :].transpose(2, 3))
