"""Recipes of your own: copy this file, change it, and train.

oner-fast train oner --recipe my_recipes.py:oner_mini_pairs_cpu
"""

from dataclasses import replace

from oner_fast.train.config.registry import recipe
from oner_fast.train.oner.recipes import oner_tiny_pictograms_cpu
from oner_fast.train.oner.settings import OneRConfiguration


@recipe
def oner_mini_pairs_cpu() -> OneRConfiguration:
    """The demo with a narrower tower, on pairs of your own."""
    base = oner_tiny_pictograms_cpu()
    return replace(
        base,
        model=replace(base.model, width=192, heads=3),
        data=replace(base.data, train_data="data/pairs"),
        optim=replace(base.optim, steps=300, batch_size=64),
        run=replace(base.run, run_dir="runs/mini"),
    )
