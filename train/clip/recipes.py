"""Recipes of two-tower CLIPs, and of the second stage of UTA: contrast on pairs after alignment."""

from __future__ import annotations

from dataclasses import replace

from oner_fast.models.clip import CLIPConfig
from oner_fast.train.clip.settings import CLIPConfiguration, Contrast
from oner_fast.train.config.common import Data, Optimisation, Run
from oner_fast.train.config.registry import recipe

DEFAULT = "clip_tiny_icons_cpu"


@recipe
def clip_tiny_icons_cpu() -> CLIPConfiguration:
    """A CLIP of 6 x 6 patches on 28,000 icons, to be the teacher of UTA (21 minutes on one busy CPU core)."""
    return CLIPConfiguration(
        model=CLIPConfig(
            image_size=48,
            patch_size=8,
            vision_width=192,
            vision_layers=4,
            vision_heads=3,
            text_width=128,
            text_layers=3,
            text_heads=2,
            context_length=16,
            embed_dim=256,
        ),
        data=Data(train_data="data/icons"),
        optim=Optimisation(steps=600, batch_size=256, lr=1e-3, min_lr=1e-5, warmup=60, wd=0.1),
        run=Run(run_dir="runs/clip_tiny_icons", save_every=100),
    )


@recipe
def uta_stage2_tiny_icons_cpu() -> CLIPConfiguration:
    """UTA's second stage: the aligned student of uta_tiny_icons_cpu against its teacher's text tower, on pairs."""
    base = clip_tiny_icons_cpu()
    return replace(
        base,
        contrast=Contrast(init_image="runs/uta_tiny_icons", init_text="runs/clip_tiny_icons", lock_text=True),
        optim=Optimisation(steps=200, batch_size=256, lr=2e-4, min_lr=1e-6, warmup=20, wd=0.05, grad_clip_norm=3.0),
        run=replace(base.run, run_dir="runs/uta_stage2_tiny_icons"),
    )
