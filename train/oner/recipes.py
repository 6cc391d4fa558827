"""Recipes of OneR and of the models that it is compared with.

No source states an optimiser, a batch size or a number of epochs: the values here are our choice. So are the trunk's
width and heads (ViT-B's) in the `vitb16` recipes; its 12 layers, 224 px and patches of 16 are facts. The rows of the
ablation on CC3M differ only in the weights of the contrasts: MLM and MIM stay on (our choice).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from oner_fast.models.oner import OneRConfig
from oner_fast.train.config.common import Data, Optimisation, Run
from oner_fast.train.config.registry import recipe
from oner_fast.train.oner.settings import Objectives, OneRConfiguration

DEFAULT = "oner_tiny_pictograms_cpu"

_ITC = {"itc": 1.0, "xmc": 0.0, "cic": 0.0, "cmc": 0.0}
_XMC = {"itc": 1.0, "xmc": 1.0, "cic": 0.0, "cmc": 0.0}
_XMC_CIC = {"itc": 1.0, "xmc": 1.0, "cic": 1.0, "cmc": 0.0}
_CLIP = {
    **_ITC,
    "mlm": 0.0,
    "mim": 0.0,
    "momentum_teacher": False,
    "symmetric": True,
    "learnable_temperature": True,
    "temperature": 0.07,
}
# Retrieval fine-tuning (our choice): inputs without masks, as an evaluation has them, and RandAugment.
_UNMASKED: dict[str, Any] = {"mlm": 0.0, "mim": 0.0, "same_caption": "ignore"}
_RAND_AUGMENT: dict[str, Any] = {"aug_operations": 2, "aug_magnitude": 5.0}


def _row(base: OneRConfiguration, name: str, objectives: dict[str, float | bool], **model: bool) -> OneRConfiguration:
    """`base` with other contrasts (and, for the comparison rows, other towers), in a run folder of its own."""
    return replace(
        base,
        model=replace(base.model, **model),  # type: ignore[arg-type]
        objectives=replace(base.objectives, **objectives),  # type: ignore[arg-type]
        run=replace(base.run, run_dir=f"runs/{name}"),
    )


@recipe
def oner_tiny_pictograms_cpu() -> OneRConfiguration:
    """The demo: the whole of OneR on 10,500 pictograms (about five minutes on two CPU cores)."""
    return OneRConfiguration(
        model=OneRConfig(
            image_size=48,
            patch_size=16,
            width=256,
            depth=4,
            heads=4,
            embed_dim=128,
            projector_hidden=0,
            max_text_tokens=24,
        ),
        objectives=Objectives(predictor_hidden=512, momentum=0.95, mlm=0.2, mask_patch_ratio=0.25),
        data=Data(train_data="data/pictograms"),
        optim=Optimisation(steps=600, batch_size=128, lr=1e-3, warmup=50, wd=0.05),
        run=Run(run_dir="runs/demo", save_every=150, snapshot_every=60),
    )


@recipe
def oner_small_icons_cpu() -> OneRConfiguration:
    """The whole of OneR on 28,000 icons (about 25 minutes on two CPU cores)."""
    return OneRConfiguration(
        model=OneRConfig(
            image_size=48,
            patch_size=16,
            width=256,
            depth=4,
            heads=4,
            embed_dim=256,
            projector_hidden=0,
            max_text_tokens=24,
        ),
        objectives=Objectives(predictor_hidden=768, momentum=0.98, mlm=0.2, mask_patch_ratio=0.25),
        data=Data(train_data="data/icons"),
        optim=Optimisation(steps=1400, batch_size=128, lr=1e-3, warmup=100, wd=0.05),
        run=Run(run_dir="runs/icons", save_every=200, snapshot_every=140),
    )


@recipe
def oner_finetune_tiny_icons_cpu() -> OneRConfiguration:
    """Retrieval fine-tuning of the demo's model on a few thousand icons at 96 px, 5 epochs.

    The icons come from `oner-fast data icons --limit 3000 --size 96 --output data/icons_small`.
    """
    base = oner_tiny_pictograms_cpu()
    return replace(
        base,
        model=replace(base.model, image_size=96),
        objectives=replace(base.objectives, **_UNMASKED),
        data=replace(base.data, train_data="data/icons_small", **_RAND_AUGMENT),
        optim=replace(base.optim, steps=210, batch_size=64, lr=5e-4, min_lr=1e-6, warmup=20),
        run=replace(base.run, run_dir="runs/finetune_icons", init_from="runs/demo", save_every=70, snapshot_every=0),
    )


@recipe
def oner_itc_tiny_pictograms_cpu() -> OneRConfiguration:
    """Ablation at the demo's size: ITC alone in one tower, which the paper reports to collapse."""
    return _row(oner_tiny_pictograms_cpu(), "oner_itc_tiny", _ITC)


@recipe
def oner_xmc_tiny_pictograms_cpu() -> OneRConfiguration:
    """Ablation at the demo's size: ITC + XMC."""
    return _row(oner_tiny_pictograms_cpu(), "oner_xmc_tiny", _XMC)


@recipe
def oner_xmc_cic_tiny_pictograms_cpu() -> OneRConfiguration:
    """Ablation at the demo's size: ITC + XMC + CIC."""
    return _row(oner_tiny_pictograms_cpu(), "oner_xmc_cic_tiny", _XMC_CIC)


@recipe
def twotowers_tiny_pictograms_cpu() -> OneRConfiguration:
    """Comparison at the demo's size: CLIP, two towers."""
    return _row(oner_tiny_pictograms_cpu(), "twotowers_tiny", _CLIP, shared_trunk=False, shared_head=False)


@recipe
def twoheads_tiny_pictograms_cpu() -> OneRConfiguration:
    """Comparison at the demo's size: one trunk, two heads, ITC."""
    return _row(oner_tiny_pictograms_cpu(), "twoheads_tiny", _ITC, shared_head=False)


@recipe
def oner_vitb16_4m_a100x32() -> OneRConfiguration:
    """OneR on the paper's data (CC3M + SBU + Visual Genome + COCO) and objectives (ITC + CMC + MLM + MIM).

    The trunk is ViT-B/16. Its width, the optimiser and the epochs are our choice.
    """
    return OneRConfiguration(
        model=OneRConfig(grad_checkpointing=False),
        data=Data(train_data="data/4m", tokenizer="data/bert-base-uncased-vocab.txt", workers=8, aug_scale=0.5),
        optim=Optimisation(steps=39_000, batch_size=4096, lr=1e-3, min_lr=1e-5, warmup=2000, wd=0.1),
        run=Run(
            run_dir="runs/oner_vitb16_4m",
            precision="amp_bf16",
            save_every=1000,
            log_every_n_steps=20,
            snapshot_every=1000,
        ),
    )


@recipe
def oner_finetune_vitb16_coco_a100x8() -> OneRConfiguration:
    """Retrieval fine-tuning of the paper's model on COCO at 384 px, 5 epochs at 1e-5 (our choice); unmeasured.

    Of an image's five captions, those that meet in a batch are left out of each other's negatives.
    """
    base = oner_vitb16_4m_a100x32()
    return replace(
        base,
        model=replace(base.model, image_size=384),
        objectives=replace(base.objectives, **_UNMASKED),
        # The tokenizer comes with the weights.
        data=replace(base.data, train_data="data/coco", tokenizer="train", same_by="image", **_RAND_AUGMENT),
        # 566,747 captions of Karpathy's 113,287 training images make 1,106 steps an epoch.
        optim=replace(base.optim, steps=5_530, batch_size=512, accum_freq=2, lr=1e-5, min_lr=1e-7, warmup=500, wd=0.05),
        run=replace(
            base.run,
            run_dir="runs/oner_finetune_vitb16_coco",
            init_from="runs/oner_vitb16_4m",
            save_every=500,
            snapshot_every=0,
        ),
    )


@recipe
def oner_vitb16_cc3m_a100x8() -> OneRConfiguration:
    """The last row of the paper's ablation: OneR (ITC + CMC) on CC3M; 40 epochs are our choice."""
    base = oner_vitb16_4m_a100x32()
    return replace(
        base,
        data=replace(base.data, train_data="data/cc3m"),
        # 40 epochs of 708 steps, if 2.9 M of the pairs can be fetched; four micro-batches of 128 pairs a GPU.
        optim=replace(base.optim, steps=28_320, accum_freq=4),
        run=replace(base.run, run_dir="runs/oner_vitb16_cc3m"),
    )


@recipe
def oner_vitb16_cc3m_gpu24gb() -> OneRConfiguration:
    """OneR on CC3M with one GPU of 24 GB, by two-pass accumulation, with the batch of the A100 recipe; unmeasured.

    Two passes over 64 micro-batches of 64 pairs. Counted, not measured: 2.5 GiB of weights, gradients, optimiser and
    teacher; 0.25 GiB of bfloat16 weights; 8.4 GiB of saved activations (134 MiB a pair with captions of 16 tokens);
    1.1 GiB of images, which student and teacher each hold for the whole batch. Temporary tensors come on top.
    """
    base = oner_vitb16_cc3m_a100x8()
    return replace(
        base,
        optim=replace(base.optim, accum_freq=64),
        run=replace(base.run, run_dir="runs/oner_vitb16_cc3m_gpu24gb"),
    )


@recipe
def oner_itc_vitb16_cc3m_a100x8() -> OneRConfiguration:
    """Ablation: ITC alone in one tower (the paper: ImageNet zero-shot 1.6, it collapses)."""
    return _row(oner_vitb16_cc3m_a100x8(), "oner_itc_vitb16_cc3m", _ITC)


@recipe
def oner_xmc_vitb16_cc3m_a100x8() -> OneRConfiguration:
    """Ablation: ITC + XMC (the paper: ImageNet zero-shot 22.1)."""
    return _row(oner_vitb16_cc3m_a100x8(), "oner_xmc_vitb16_cc3m", _XMC)


@recipe
def oner_xmc_cic_vitb16_cc3m_a100x8() -> OneRConfiguration:
    """Ablation: ITC + XMC + CIC (the paper: ImageNet zero-shot 22.9)."""
    return _row(oner_vitb16_cc3m_a100x8(), "oner_xmc_cic_vitb16_cc3m", _XMC_CIC)


@recipe
def twotowers_vitb16_cc3m_a100x8() -> OneRConfiguration:
    """Comparison: CLIP, two towers (the paper: ImageNet zero-shot 17.1)."""
    return _row(oner_vitb16_cc3m_a100x8(), "twotowers_vitb16_cc3m", _CLIP, shared_trunk=False, shared_head=False)


@recipe
def twoheads_vitb16_cc3m_a100x8() -> OneRConfiguration:
    """Comparison: one trunk, two heads, ITC (the paper: ImageNet zero-shot 17.5)."""
    return _row(oner_vitb16_cc3m_a100x8(), "twoheads_vitb16_cc3m", _ITC, shared_head=False)
