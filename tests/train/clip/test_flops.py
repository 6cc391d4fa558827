"""The count of a CLIP's operations against the matrix products that its towers really make."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from oner_fast.models.clip import CLIPConfig
from oner_fast.models.forward_flops import clip_flops, contrast_flops
from oner_fast.models.optional_packages import optional_package
from oner_fast.train.clip.flops import step_flops
from oner_fast.train.clip.towers import NewTowers

CONFIG = CLIPConfig(
    image_size=32, patch_size=8, vision_width=16, vision_layers=3, vision_heads=2, text_width=12, text_layers=2,
    text_heads=2, context_length=9, embed_dim=10,
)  # fmt: skip


def test_the_products_are_those_of_the_towers() -> None:
    optional_package("open_clip")  # or the test is skipped for want of it
    towers = NewTowers(CONFIG, 0.07)
    texts = towers.read(["a red square", "blue"])
    lengths = texts.lengths.tolist()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        towers(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), texts)
    # The counter takes causal attention for the whole square, in the first of the two blocks of the text tower.
    unseen = sum(4 * 12 * (length**2 - length * (length + 1) / 2) for length in lengths)
    assert clip_flops(CONFIG, lengths) == counter.get_total_flops() - unseen


def test_a_step_is_three_forwards_with_the_contrast() -> None:
    wanted = 3 * (clip_flops(CONFIG, [4, 5]) + contrast_flops(8, 10) / 4)
    assert step_flops(CONFIG, [4, 5], 8) == pytest.approx(wanted)
    # open_clip states 20.5 GMAC for both towers of ViT-B-16 with 77 tokens; the last blocks' other tokens are left out.
    both = clip_flops(CLIPConfig(), [77]) / 2e9
    assert 17.5 < both < 20.5
