"""Recipes of UTA and of the methods that it is compared with.

The sources state the images (ImageNet-21K without labels), the reversed block-wise masks, the teacher
(EVA01-CLIP-g/14-plus) and the architecture of B, L and g. Everything else is our choice: half of the patches hidden,
AdamW (0.9, 0.98), a peak learning rate of 1.5e-3, weight decay 0.05, batches of 2048, gradients clipped at 3.0, 150
epochs, the crops, and pre-training with patches of 14 at 224 px, which is the teacher's own grid.
`oner_fast.models.uta.resampled` takes the pre-trained students to their final resolutions: B to patches of 16 at
224 px, L and g to 336 px.
"""

from __future__ import annotations

from dataclasses import replace

from oner_fast.models.uta import UTA_SIZES, UTAConfig
from oner_fast.train.config.common import Data, Optimisation, Run
from oner_fast.train.config.registry import recipe
from oner_fast.train.uta.settings import Alignment, UTAConfiguration

DEFAULT = "uta_tiny_icons_cpu"

_STEPS = 600
_EQUAL_STEPS = 358
"""Steps of distillation with the operations of `_STEPS` steps of UTA; the teacher's are counted in both."""
_EQUAL_STEPS_MASK_TOKEN = 360
"""The same for mask-token prediction, whose hidden patches are not embedded."""


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
    """Comparison: feature distillation, every token enters the student; as many operations as the UTA recipe."""
    return _row("distillation_tiny_icons", _EQUAL_STEPS, objective="distillation")


@recipe
def distillation_long_tiny_icons_cpu() -> UTAConfiguration:
    """Comparison: feature distillation for as many steps as the UTA recipe, with 1.7 times its operations."""
    return _row("distillation_long_tiny_icons", objective="distillation")


@recipe
def masktoken_tiny_icons_cpu() -> UTAConfiguration:
    """Comparison: mask-token prediction (EVA's MIM); as many operations as the UTA recipe."""
    return _row("masktoken_tiny_icons", _EQUAL_STEPS_MASK_TOKEN, objective="mask_token", mask="block")


def _pre_trained(size: str) -> UTAConfig:
    """A student with patches of 14 at 224 px: the 16 x 16 grid of the teacher, whose input is then not resized."""
    return replace(UTA_SIZES[size], image_size=224, patch_size=14)


@recipe
def uta_b14_in21k_a100x8() -> UTAConfiguration:
    """UTA's B towards EVA01-CLIP-g/14-plus, on ImageNet-21K without labels; epochs and optimiser are our choice.

    Counted, not measured: 69 GFLOP an image for the student, forward and backward, and 535 for the teacher, or 1.3e21
    in 150 epochs.
    """
    return UTAConfiguration(
        model=_pre_trained("b"),
        alignment=Alignment(teacher="EVA01-g-14-plus:merged2b_s11b_b114k"),
        data=Data(train_data="data/in21k", workers=12, aug_scale=0.4, aug_flip=0.5),
        # 150 epochs of 14.2 M images; warm-up of one epoch.
        optim=Optimisation(
            steps=1_040_000, batch_size=2048, lr=1.5e-3, min_lr=1e-5, warmup=6_930, wd=0.05, grad_clip_norm=3.0
        ),
        run=Run(
            run_dir="runs/uta_b14_in21k",
            precision="amp_bf16",
            save_every=2000,
            log_every_n_steps=50,
            deterministic=False,
        ),
    )


@recipe
def uta_l14_in21k_a100x32() -> UTAConfiguration:
    """UTA's L towards EVA01-CLIP-g/14-plus, on ImageNet-21K without labels; epochs and optimiser are our choice.

    Counted, not measured: 240 GFLOP an image for the student, forward and backward, and 535 for the teacher, or 1.7e21
    in 150 epochs. Stochastic depth of 0.1 is our choice.
    """
    base = uta_b14_in21k_a100x8()
    return replace(
        base,
        model=_pre_trained("l"),
        alignment=replace(base.alignment, drop_path=0.1),
        run=replace(base.run, run_dir="runs/uta_l14_in21k"),
    )


@recipe
def uta_g14_in21k_a100x64() -> UTAConfiguration:
    """UTA's g towards EVA01-CLIP-g/14-plus, on ImageNet-21K without labels; epochs and optimiser are our choice.

    Counted, not measured. Operations: 794 GFLOP an image for the student, forward and backward, and 535 for the
    teacher, or 2.8e21 in 150 epochs; that is 6,300 A100-hours at 40 % of 312 TFLOP/s, four days on 64 of them. Memory
    of a GPU, which holds 32 images and whole copies of both models: 15.1 GiB of weights, gradients and optimiser; 1.9
    GiB of bfloat16 weights; 2.5 GiB of teacher, with its text tower; 9.4 GiB of saved activations (7.5 MiB an image and
    block). Temporary tensors come on top. Stochastic depth of 0.1 is our choice.
    """
    base = uta_l14_in21k_a100x32()
    return replace(base, model=_pre_trained("g"), run=replace(base.run, run_dir="runs/uta_g14_in21k"))
