"""Choose substitutes for samples that cannot be read."""

from collections.abc import Iterator

import torch

from oner_fast.philox import SUBSTITUTE, random_u32

CANDIDATES = 256


def substitutes(seed: int, epoch: int, slot: int, n: int) -> Iterator[int]:
    """Yield the candidates for a corrupt slot in the order of trial: `CANDIDATES` sample numbers below n.

    They depend on (seed, epoch, slot) alone. Therefore no other slot changes, the batch keeps its size, no rank waits,
    and each worker and each restart chooses the same substitute.
    """
    draws = random_u32(seed, SUBSTITUTE, epoch, torch.tensor([slot]), CANDIDATES)[0]
    yield from ((draws * n) >> 32).tolist()
