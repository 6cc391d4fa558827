"""The recipe of a LiT-like teacher from packaged encoders."""

from __future__ import annotations

from oner_fast.models.lit import LiTConfig
from oner_fast.train.config.common import Data, Optimisation, Run
from oner_fast.train.config.registry import recipe
from oner_fast.train.lit.settings import LiTConfiguration

DEFAULT = "lit_tiny_icons_cpu"


@recipe
def lit_tiny_icons_cpu() -> LiTConfiguration:
    """Heads on EfficientNet-Lite0 and MiniLM from 28,000 icons of 48 px, to be a teacher of UTA's tiny student."""
    return LiTConfiguration(
        model=LiTConfig(image_size=48, grid=6, embed_dim=256),
        data=Data(train_data="data/icons"),
        optim=Optimisation(steps=300, batch_size=256, lr=1e-3, min_lr=1e-5, warmup=30, wd=0.1),
        run=Run(run_dir="runs/lit_tiny_icons", save_every=100),
    )
