"""A permutation of n items that needs no memory: a keyed Feistel network with cycle walking."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from oner_fast.philox import PERMUTE, random_u32

_ROUNDS = 8


class Permutation:
    """Pseudo-random permutation of range(n), different for each (seed, epoch) and evaluated at any place in O(1).

    An item is a pair (left, right) in an a x b grid with a * b >= n. A round adds a keyed hash of one half to the
    other, modulo its side. This can be undone, so each round is a bijection. A value of n or more passes through the
    rounds again. The grid exceeds n by less than a, so that this is rare.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        """Raise ValueError where n < 1, or where seed or epoch do not fit 64 and 32 bits."""
        if n < 1:
            raise ValueError(f"a permutation needs at least 1 item, not {n}")
        self.n = n
        self._rows = max(1, math.isqrt(n))
        self._columns = -(-n // self._rows)
        words = random_u32(seed, PERMUTE, epoch, torch.zeros(1, dtype=torch.int64), 2 * _ROUNDS)[0].tolist()
        self._keys = [np.uint64(low | high << 32) for low, high in zip(words[::2], words[1::2], strict=True)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        """Item at place `index`. Raises IndexError outside [0, n)."""
        return int(self.take(np.asarray([index]))[0])

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Items at the places `indices`, an integer array of any shape. Raises IndexError outside [0, n)."""
        places = np.asarray(indices, dtype=np.int64)
        if places.size and (places.min() < 0 or places.max() >= self.n):
            raise IndexError(f"places must be in [0, {self.n}), not {places.min()} to {places.max()}")
        items = self._once(places.reshape(-1))
        outside = items >= self.n
        while outside.any():
            items[outside] = self._once(items[outside])
            outside = items >= self.n
        return items.reshape(places.shape)

    def _once(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        left, right = np.divmod(values.astype(np.uint64), np.uint64(self._columns))
        for index, key in enumerate(self._keys):
            if index % 2:
                right = (right + _hash(left, key) % np.uint64(self._columns)) % np.uint64(self._columns)
            else:
                left = (left + _hash(right, key) % np.uint64(self._rows)) % np.uint64(self._rows)
        return (left * np.uint64(self._columns) + right).astype(np.int64)


def _hash(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Mix `values` with a key, by the finaliser of SplitMix64."""
    mixed = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
