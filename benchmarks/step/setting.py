"""Setting of the step benchmark: a configuration and one fixed synthetic batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from oner_fast.data.batch import PairBatch, TokenizedText
from oner_fast.train.oner import recipes
from oner_fast.train.oner.settings import OneRConfiguration

PAIRS = 8
SHORTEST, LONGEST = 8, 40
MOMENTUM = 0.996
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Words:
    """The facts about a tokenizer that masking needs."""

    vocab_size: int
    mask_id: int = 2
    first_word_id: int = 3


def vitb16() -> OneRConfiguration:
    """The recipe of OneR (ITC + CMC + MLM + MIM, momentum teacher) at ViT-B/16, 224 px, with 8 pairs a step."""
    base = recipes.oner_vitb16_4m_a100x32()
    return replace(base, optim=replace(base.optim, batch_size=PAIRS, accum_freq=1))


def synthetic_batch(config: OneRConfiguration, shortest: int = SHORTEST, longest: int = LONGEST) -> PairBatch:
    """Make random images and captions.

    The lengths of captions are spread evenly from `shortest` to `longest` tokens, in random order.
    """
    pairs, model = config.optim.batch_size, config.model
    draw = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shortest, longest, pairs).round().long()[torch.randperm(pairs, generator=draw)]
    total = int(lengths.sum())
    text = TokenizedText(
        torch.randint(3, model.vocab_size, (total,), generator=draw),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32),
        torch.cat([torch.arange(int(length)) for length in lengths]).int(),
    )
    size = (pairs, 3, model.image_size, model.image_size)
    images = torch.randint(256, size, dtype=torch.uint8, generator=draw)
    return PairBatch(images, text, torch.arange(pairs), ["a caption"] * pairs, step=0, epoch=0)
