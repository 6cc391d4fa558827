"""What a OneR training is: every number that shapes it, as typed dataclasses. Flags carry open_clip's names where it
has one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from oner_fast.models.oner import OneRConfig

MIN_TEMPERATURE = 0.01


def check_temperature(temperature: float) -> None:
    """Raise ValueError for one under the least that CLIP lets it become."""
    if not temperature >= MIN_TEMPERATURE:
        raise ValueError(f"temperature must be at least {MIN_TEMPERATURE} (logit_scale 100), got {temperature}")


@dataclass(frozen=True)
class Objectives:
    """Weights of the losses (0 leaves one out, and with it the passes that only it needs) and the shape of the
    contrast."""

    itc: float = 1.0
    """F(I) against F(T) and the swapped pair."""
    xmc: float = 0.0
    """Cross-modal mixup: mean of F(I) and F(T) on both sides."""
    cic: float = 0.0
    """Contextual invariance: mean of F(I|T) and F(T|I) against the mean of F(I) and F(T)."""
    cmc: float = 1.0
    """Contextual mixup: F(I,T) against the mean of F(I) and F(T)."""
    mlm: float = 1.0
    """Masked words, in the text pass and in the image+text pass."""
    mim: float = 1.0
    """Masked patches, in the image pass and in the image+text pass."""
    temperature: float = 0.2
    """1 / logit_scale (MoCo v3's 0.2 by default)."""
    learnable_temperature: bool = False
    symmetric: bool = False
    """Cross-entropy over columns too (CLIP); False is MoCo v3's query-to-key form."""
    momentum_teacher: bool = True
    """Keys from the moving-average teacher; False: from the student itself, with gradient and without predictor
    (CLIP)."""
    momentum: float = 0.996
    """The teacher's momentum at the first step; it rises to 1 with half a cosine."""
    predictor_hidden: int = 4096
    mask_patch_ratio: float = 0.5
    mask_word_ratio: float = 0.15
    force_patch_dropout: float = 0.0
    """Share of the patches left out of the student's passes, before they are embedded."""

    def __post_init__(self) -> None:
        weights = (self.itc, self.xmc, self.cic, self.cmc, self.mlm, self.mim)
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(f"weights of the objectives must not be negative, and one must be above 0, got {weights}")
        check_temperature(self.temperature)
        if not 0.0 <= self.momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {self.momentum}")
        for name in ("mask_patch_ratio", "mask_word_ratio", "force_patch_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def contrastive(self) -> bool:
        """Whether any of the four contrasts is on."""
        return any((self.itc, self.xmc, self.cic, self.cmc))


@dataclass(frozen=True)
class Data:
    """Where the pairs come from and how they are read."""

    train_data: str = "data/pictograms"
    """A dataset folder, a tar, a glob of tars (img2dataset's as they are), or a stream (pipe:COMMAND, a URL)."""
    train_split: str = "train"
    val_split: str = "val"
    """Split of the same folder that snapshots of the embeddings are taken from; unused where there is none."""
    workers: int = 1
    """Processes that decode; the order and the bytes of batches do not depend on their number."""
    tokenizer: str = "train"
    """`train` learns a WordPiece vocabulary from the captions; else a path or a package that holds one."""
    tokenizer_vocab: int = 8192
    """Largest vocabulary that is learnt from the captions."""
    aug_scale: float = 0.6
    """Smallest share of a picture's area that a random crop keeps (the whole of it is the largest)."""
    aug_flip: float = 0.0
    """Probability of a horizontal flip; 0 because captions speak of left and right."""


@dataclass(frozen=True)
class Optimisation:
    """AdamW with linear warm-up and half a cosine."""

    steps: int = 1000
    batch_size: int = 4096
    """Pairs a step, over all ranks and micro-batches: the N of the contrast."""
    accum_freq: int = 1
    """Micro-batches a step; the contrast still sees the whole batch."""
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup: int = 100
    """Steps of warm-up."""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    wd: float = 0.1
    grad_clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accum_freq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accum_freq:
            raise ValueError(
                f"batch_size must be a multiple of accum_freq, got {self.batch_size} and {self.accum_freq}"
            )
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"needs 0 <= warmup < steps, got warmup {self.warmup} and steps {self.steps}")
        if not 0.0 <= self.min_lr <= self.lr < math.inf:
            raise ValueError(f"needs 0 <= min_lr <= lr, got min_lr {self.min_lr} and lr {self.lr}")


@dataclass(frozen=True)
class Run:
    """How and where the run is carried out; nothing here changes what is learnt, but precision, seed and threads."""

    run_dir: str = "runs/oner"
    recipe: str = ""
    """The recipe that the settings began from; the recipe itself writes it."""
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "fp32", "amp_bf16"] = "auto"
    """auto: bfloat16 autocast where the processor multiplies in it, else float32."""
    threads: int = 0
    """Threads of the CPU's ops; 0 leaves torch's choice."""
    resume: str = "latest"
    """latest, none, or the path of a checkpoint."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    log_every_n_steps: int = 10
    snapshot_every: int = 0
    """Steps between snapshots of the embeddings of validation pairs; 0: none."""
    snapshot_pairs: int = 256
    deterministic: bool = True
    """Train under torch.use_deterministic_algorithms(True)."""
    max_skipped_steps: int = 20
    """Non-finite steps in a row that end the run."""


@dataclass(frozen=True)
class OneRTraining:
    """The whole configuration of a run; saved beside it as config.json."""

    model: OneRConfig = field(default_factory=OneRConfig)
    objectives: Objectives = field(default_factory=Objectives)
    data: Data = field(default_factory=Data)
    optim: Optimisation = field(default_factory=Optimisation)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        objectives, ratio = self.objectives, self.objectives.mask_word_ratio
        if self.model.patch_size < 1 or self.model.image_size % self.model.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {self.model.image_size} and {self.model.patch_size}"
            )
        if not self.model.shared_trunk and not objectives.itc:
            raise ValueError("two trunks (shared_trunk=False) need itc above 0: nothing else trains both")
        if objectives.mlm and ratio == 0:
            raise ValueError("mlm is above 0 but mask_word_ratio is 0: no word is masked")
        if objectives.contrastive and not objectives.itc and not self.model.shared_head:
            raise ValueError("two heads (shared_head=False) need itc above 0: the other contrasts do not reach both")
        cells = (self.model.image_size // self.model.patch_size) ** 2
        cells -= int(self.objectives.force_patch_dropout * cells)
        if self.objectives.mim and int(self.objectives.mask_patch_ratio * cells) == 0:
            ratio = self.objectives.mask_patch_ratio
            raise ValueError(f"mim is above 0 but mask_patch_ratio {ratio} of {cells} patches masks none")
        if not self.model.shared_trunk and any((self.objectives.xmc, self.objectives.cic, self.objectives.cmc)):
            raise ValueError("two trunks (shared_trunk=False) have no joint pass: set xmc, cic and cmc to 0")
