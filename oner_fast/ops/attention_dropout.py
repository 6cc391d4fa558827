"""Dropout of attention weights whose draws depend on the seed and on the place of a weight alone.

Sixteen bits of Philox4x32-10 decide about the weight of query i and key j in head h of sequence s. They are a function
of (seed, s, h, i, j): every implementation computes the same bits, again in backward, and none stores them. A weight is
dropped where its bits are below `level(dropout_p)`; a kept one is multiplied by `made_up(level)`.

The key of Philox is the seed. The counter is (j // 8, i, h, `philox.DROP_ATTENTION` + s). Of the four words that it
gives, word m // 2 holds the bits of key 8 (j // 8) + m, in its lower half where m is even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oner_fast.ops import checks
from oner_fast.philox import DROP_ATTENTION, philox4x32

LEVELS = 1 << 16  # what 16 bits tell apart; `dropout_p` is rounded to a multiple of 1 / LEVELS
KEYS_EACH = 8  # keys whose bits one block of Philox holds
_WORD, _HALF = 0xFFFFFFFF, 0xFFFF


def level(dropout_p: float) -> int:
    """Return how many of the `LEVELS` values of 16 bits drop a weight; at least one keeps it."""
    return min(int(dropout_p * LEVELS + 0.5), LEVELS - 1)


def made_up(dropped: int) -> float:
    """Return the factor of kept weights, 1 / the share that is kept, so that the expected result is that of no dropout.

    `dropped` is a `level`.
    """
    return LEVELS / (LEVELS - dropped)


def check(op: str, dropout_p: float, dropout_seed: Tensor | int | None) -> None:
    """Raise unless the rate is in [0, 1), and the seed None, an int in [0, 2^64), or a 0-d int64 tensor."""
    checks.number(op, "dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    if isinstance(dropout_seed, Tensor):
        if checks.is_tensor(op, "dropout_seed", dropout_seed).dtype != torch.int64:
            raise TypeError(f"{op}: dropout_seed must be an int or a 0-d int64 tensor, got {dropout_seed.dtype}")
        checks.shape(op, "dropout_seed", dropout_seed, "()", ())
    elif dropout_seed is not None:
        checks.whole(op, "dropout_seed", dropout_seed, bits=64)


def seed_of(op: str, dropout_p: float, dropout_seed: Tensor | int | None, like: Tensor) -> Tensor | None:
    """Return the seed of a call as a 0-d int64 tensor on the device of `like`, or None where nothing is dropped.

    Without `dropout_seed` the seed comes from the generator of that device, which `torch.manual_seed` sets. A seed of
    2^63 or more wraps around into the sign.
    """
    check(op, dropout_p, dropout_seed)
    if level(dropout_p) == 0:
        return None
    if dropout_seed is None:
        return torch.randint((1 << 63) - 1, (), dtype=torch.int64, device=like.device)
    if isinstance(dropout_seed, Tensor):
        return dropout_seed.to(like.device)
    signed = dropout_seed - (1 << 64) if dropout_seed >= 1 << 63 else dropout_seed
    return torch.full((), signed, dtype=torch.int64, device=like.device)


def kept(seed: Tensor, dropped: int, sequences: Tensor, heads: int, queries: Tensor, keys: int) -> Tensor:
    """Mark the weights that are kept.

    Args:
        seed: 0-d int64.
        dropped: the `level` of the rate.
        sequences: (S,) int64, the numbers of the sequences.
        heads: the number of the query's heads.
        queries: (Lq,) int64, the places of the queries in their sequences.
        keys: the number of keys, whose places begin with 0.

    Returns:
        (S, H, Lq, keys) bool.
    """
    device = seed.device
    blocks = torch.arange(-(-keys // KEYS_EACH), device=device)
    head = torch.arange(heads, device=device).view(-1, 1, 1)
    counter = (blocks, queries.view(-1, 1), head, sequences.view(-1, 1, 1, 1) + DROP_ATTENTION)
    words = torch.stack(philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD)), dim=-1)  # [S, H, Lq, blocks, 4]
    draws = torch.stack((words & _HALF, words >> 16), dim=-1).flatten(-3)
    return draws[..., :keys] >= dropped
