"""A modality gap at the start of a training, as a factor of the ablation (our choice; no source sets one)."""

from __future__ import annotations

import torch

from oner_fast.models.oner import OneR

POSITION_STD = 0.02
"""Standard deviation of the initial positions of patches and words."""


@torch.no_grad()
def open_gap(tower: OneR, strength: float) -> None:
    """Push words and patches apart: add a vector to the positions of words and subtract it from those of patches.

    The vector has a random sign in each dimension, drawn from torch's generator, and the size `strength` times
    `POSITION_STD`. Every parameter can still learn, so that training may close the gap.
    """
    words, patches = tower.word_embedding.positions, tower.patch_embedding.positions
    signs = torch.randint(2, (words.shape[1],), device="cpu").to(words) * 2 - 1
    words.add_(signs, alpha=strength * POSITION_STD)
    patches.sub_(signs, alpha=strength * POSITION_STD)
