"""Recipes of UTA and of the methods that it is compared with.

The paper's choices (section 4.1): ImageNet-21K without labels, batch 2048, AdamW (0.9, 0.98), peak learning rate
1.5e-3, weight decay 0.05, gradient norm 3.0, half of the patches hidden by reversed block-wise masks; its teacher is
EVA01-CLIP-g/14-plus.
"""

from __future__ import annotations

from dataclasses import replace

from oner_fast.models.uta import UTA_SIZES
from oner_fast.train.config.common import Data, Optimisation, Run
from oner_fast.train.config.registry import recipe
from oner_fast.train.uta.settings import Alignment, UTAConfiguration

DEFAULT = "uta_tiny_icons_cpu"

_STEPS = 600
_ALL_TOKENS = 37 / 19
"""Tokens of a student that reads all 6 x 6 patches, divided by the tokens of a student that reads half of them."""


@recipe
def uta_tiny_icons_cpu() -> UTAConfiguration:
    """UTA from the icons' images alone, towards the CLIP of clip_tiny_icons_cpu (14 minutes on one busy core)."""
    return UTAConfiguration(
        model=UTA_SIZES["tiny"],
        alignment=Alignment(teacher="runs/clip_tiny_icons", mask_ratio=0.5),
        data=Data(train_data="data/icons"),
        optim=Optimisation(
            steps=_STEPS, batch_size=128, lr=1.5e-3, min_lr=1e-5, warmup=60, wd=0.05, grad_clip_norm=3.0
        ),
        run=Run(run_dir="runs/uta_tiny_icons", save_every=200),
    )


def _row(name: str, steps: int = _STEPS, **alignment: object) -> UTAConfiguration:
    """The tiny recipe with another objective or mask, in a run folder of its own."""
    base = uta_tiny_icons_cpu()
    return replace(
        base,
        model=replace(base.model, mask_token=alignment.get("objective") == "mask_token"),
        alignment=replace(base.alignment, **alignment),  # type: ignore[arg-type]
        optim=replace(base.optim, steps=steps),
        run=replace(base.run, run_dir=f"runs/{name}"),
    )


@recipe
def uta_random_tiny_icons_cpu() -> UTAConfiguration:
    """Ablation: uniform random masks."""
    return _row("uta_random_tiny_icons", mask="random")


@recipe
def uta_block_tiny_icons_cpu() -> UTAConfiguration:
    """Ablation: block-wise masks, which hide the centre."""
    return _row("uta_block_tiny_icons", mask="block")


@recipe
def distillation_tiny_icons_cpu() -> UTAConfiguration:
    """Comparison: feature distillation, every token enters the student; as many tokens in all as the UTA recipe."""
    return _row("distillation_tiny_icons", round(_STEPS / _ALL_TOKENS), objective="distillation")


@recipe
def distillation_long_tiny_icons_cpu() -> UTAConfiguration:
    """Comparison: feature distillation for as many steps as the UTA recipe, at twice its cost."""
    return _row("distillation_long_tiny_icons", objective="distillation")


@recipe
def masktoken_tiny_icons_cpu() -> UTAConfiguration:
    """Comparison: mask-token prediction (EVA's MIM); as many tokens in all as the UTA recipe."""
    return _row("masktoken_tiny_icons", round(_STEPS / _ALL_TOKENS), objective="mask_token", mask="block")


@recipe
def uta_b16_in21k_a100x8() -> UTAConfiguration:
    """The paper's B student: ImageNet-21K without labels, 150 epochs, towards EVA01-CLIP-g/14-plus."""
    return UTAConfiguration(
        model=UTA_SIZES["b"],
        alignment=Alignment(teacher="EVA01-g-14-plus:merged2b_s11b_b114k"),
        data=Data(train_data="data/in21k", workers=12, aug_scale=0.4, aug_flip=0.5),
        # 150 epochs of 14.2 M images; warm-up of one epoch.
        optim=Optimisation(
            steps=1_040_000, batch_size=2048, lr=1.5e-3, min_lr=1e-5, warmup=6_930, wd=0.05, grad_clip_norm=3.0
        ),
        run=Run(
            run_dir="runs/uta_b16_in21k",
            precision="amp_bf16",
            save_every=2000,
            log_every_n_steps=50,
            deterministic=False,
        ),
    )


@recipe
def uta_l14_in21k_a100x32() -> UTAConfiguration:
    """The paper's L student at 336 px: ImageNet-21K without labels, 150 epochs, towards EVA01-CLIP-g/14-plus."""
    base = uta_b16_in21k_a100x8()
    return replace(
        base,
        model=replace(UTA_SIZES["l"], grad_checkpointing=True),
        run=replace(base.run, run_dir="runs/uta_l14_in21k"),
    )
