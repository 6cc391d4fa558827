"""Share of an attention kernel's tiles that its sequences fill."""

from __future__ import annotations

from oner_fast.budget.workload import Sequences

TRITON, SHORT = (64, 64), (16, 8)
"""Rows and keys of a tile: of the Triton kernels, and of the matrix instruction, which a kernel for short sequences
need not exceed."""


def efficiency(seen: Sequences, tile: tuple[int, int]) -> float:
    """Return the scores that are needed as a share of those that whole tiles compute."""
    needed = computed = 0
    for query, key in zip(seen.lengths, seen.key_lengths, strict=True):
        needed += query * key
        computed += _up(query, tile[0]) * _up(key, tile[1])
    return needed / computed if computed else 1.0


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
