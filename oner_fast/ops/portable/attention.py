"""Attention of a dense batch in plain PyTorch: the scores of a few queries at a time, in forward and again in backward.

Beside inputs and results there are a copy of a few sequences in float32 (float64 for float64) and buffers of
`PART_NUMBERS` numbers. Rows come before heads: queries are (S, Lq, H, Dh), keys and values (S, Lk, Hk, Dh).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from oner_fast.dtypes import statistics_dtype
from oner_fast.ops import attention_dropout
from oner_fast.ops.portable import parts


class Call(NamedTuple):
    """Arguments of both passes besides rows.

    `seen` is (S or 1, Lq or 1) int: how many keys each query sees, from the first on; None where it sees all.
    `sequences` (S,) int64 numbers the sequences, for dropout alone; `seed` is None where nothing is dropped.
    """

    seen: Tensor | None
    scale: float
    sequences: Tensor
    dropped: int
    seed: Tensor | None


class _Part(NamedTuple):
    place: tuple[slice, slice]
    keys: Tensor  # [s, Hk, Lk, Dh]
    values: Tensor
    queries: Tensor  # [s, Hk, G l, Dh]: the heads that share a key head lie below each other
    scores: Tensor  # [s, Hk, G l, Lk], in base 2; -inf where unseen
    unseen: Tensor | None  # like scores
    blind: Tensor | None  # [s, l]
    kept: Tensor | None  # like scores


def _parts(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Iterator[_Part]:
    sequences, rows, heads, _ = query.shape
    keys, key_heads = key.shape[1:3]
    dtype = statistics_dtype(query)
    for some in parts(sequences, rows * heads * keys):
        k, v = key[some].to(dtype).transpose(1, 2), value[some].to(dtype).transpose(1, 2)
        if call.seen is not None:  # what padding holds must meet no weight, not even one of 0
            padding = torch.arange(keys, device=key.device) >= call.seen[_of(some, call.seen, 0)].amax(1, keepdim=True)
            k, v = (x.masked_fill(padding[:, None, :, None], 0.0) for x in (k, v))
        for few in parts(rows, (some.stop - some.start) * heads * keys):
            q = _below_each_other(query[some, few].to(dtype), key_heads)
            scores = q * (call.scale / math.log(2)) @ k.mT
            unseen = blind = kept = None
            if call.seen is not None:
                seen = call.seen[_of(some, call.seen, 0), _of(few, call.seen, 1)]
                blind = (seen == 0).expand(some.stop - some.start, few.stop - few.start)
                hidden = torch.arange(keys, device=key.device) >= seen.unsqueeze(-1)  # [s or 1, l or 1, Lk]
                hidden = hidden.expand(*blind.shape, keys).unsqueeze(1)
                unseen = hidden.expand(-1, heads, -1, -1).unflatten(1, (key_heads, -1)).flatten(2, 3)
                scores = scores.masked_fill(unseen, float("-inf"))
            if call.seed is not None:
                places = torch.arange(few.start, few.stop, device=key.device)
                kept = attention_dropout.kept(
                    call.seed, call.dropped, call.sequences[some], heads, places, keys
                ).unflatten(1, (key_heads, -1)).flatten(2, 3)  # fmt: skip
            yield _Part((some, few), k, v, q, scores, unseen, blind, kept)


def _of(part: slice, seen: Tensor, dim: int) -> slice:
    """Return the part of a dimension of `seen`, all of it where one number stands for all."""
    return slice(None) if seen.shape[dim] == 1 else part


def _below_each_other(rows: Tensor, key_heads: int) -> Tensor:
    """Turn (s, l, H, D) into (s, Hk, G l, D)."""
    return rows.unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _beside_each_other(rows: Tensor, length: int) -> Tensor:
    """Turn (s, Hk, G l, ...) into (s, l, H, ...)."""
    return rows.unflatten(2, (-1, length)).flatten(1, 2).transpose(1, 2)


def forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Return the result (S, Lq, H, Dh), and the largest score in base 2 and 1 / sum of each query, (2, S, Lq, H)."""
    out = query.new_zeros(query.shape)
    statistics = query.new_zeros((2, *query.shape[:3]), dtype=statistics_dtype(query))
    if out.numel() == 0 or key.shape[1] == 0:
        return out, statistics
    for part in _parts(query, key, value, call):
        length = part.place[1].stop - part.place[1].start
        maximum = part.scores.amax(-1)
        weights = torch.exp2(part.scores - maximum.masked_fill(maximum == float("-inf"), 0.0).unsqueeze(-1))
        inverse = 1 / weights.sum(-1)
        if part.kept is not None:
            weights = weights.masked_fill(~part.kept, 0.0) * attention_dropout.made_up(call.dropped)
        found = _beside_each_other(weights @ part.values * inverse.unsqueeze(-1), length)
        both = [_beside_each_other(x, length) for x in (maximum, inverse)]
        if part.blind is not None:
            blind = part.blind.unsqueeze(-1)  # [s, l, 1]
            found, both = found.masked_fill(blind.unsqueeze(-1), 0.0), [x.masked_fill(blind, 0.0) for x in both]
        out[part.place] = found.to(out.dtype)
        statistics[0][part.place], statistics[1][part.place] = both
    return out, statistics


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, statistics: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    to_query, key_heads, dtype = query.new_zeros(query.shape), key.shape[2], statistics.dtype
    to_key, to_value = (x.new_zeros(x.shape, dtype=dtype).transpose(1, 2) for x in (key, value))
    if query.numel() == 0 or key.shape[1] == 0:
        return to_query, key.new_zeros(key.shape), value.new_zeros(value.shape)
    delta = (grad.to(dtype) * out.to(dtype)).sum(-1)
    for part in _parts(query, key, value, call):
        some, length = part.place[0], part.place[1].stop - part.place[1].start
        maximum, inverse, less = (
            _below_each_other(x[part.place].unsqueeze(-1), key_heads) for x in (*statistics, delta)
        )
        g, q = _below_each_other(grad[part.place].to(dtype), key_heads), part.queries
        if part.blind is not None:
            blind = part.blind[:, None, None, :].expand(-1, key_heads, query.shape[2] // key_heads, -1).flatten(2, 3)
            g, q, less = (x.masked_fill(blind.unsqueeze(-1), 0.0) for x in (g, q, less))
        weights = torch.exp2(part.scores - maximum) * inverse
        to_weights = g @ part.values.mT
        kept_weights = weights
        if part.kept is not None:
            by = attention_dropout.made_up(call.dropped)
            kept_weights = weights.masked_fill(~part.kept, 0.0) * by
            to_weights = to_weights.masked_fill(~part.kept, 0.0) * by
        to_scores = weights * (to_weights - less) * call.scale
        if part.unseen is not None:
            kept_weights, to_scores = (x.masked_fill(part.unseen, 0.0) for x in (kept_weights, to_scores))
        to_query[part.place] = _beside_each_other(to_scores @ part.keys, length).to(to_query.dtype)
        to_key[some] += to_scores.mT @ q
        to_value[some] += kept_weights.mT @ g
    return to_query, to_key.transpose(1, 2).to(key.dtype), to_value.transpose(1, 2).to(value.dtype)
