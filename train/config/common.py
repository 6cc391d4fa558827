"""The settings that every system shares: data, optimisation and run. Flags carry open_clip's names where it has one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from oner_fast.data.batch import SameBy

Precision = Literal["auto", "fp32", "amp_bf16"]

SameCaption = Literal["negative", "positive", "ignore"]
"""Meanings of pairs of a batch with the same caption, in the contrast."""

MIN_TEMPERATURE = 0.01


def check_temperature(temperature: float) -> None:
    """Raise `ValueError` for a temperature below CLIP's lower limit."""
    if not temperature >= MIN_TEMPERATURE:
        raise ValueError(f"temperature must be at least {MIN_TEMPERATURE} (logit_scale 100), got {temperature}")


@dataclass(frozen=True)
class Data:
    """The image-text pairs, and how they are read."""

    train_data: str = "data/pictograms"
    """A data set's folder, a tar, a glob of tars (img2dataset's as they are), several of these with :: between them, or
    a stream (pipe:COMMAND, a URL)."""
    train_split: str = "train"
    val_data: str = ""
    """Data to evaluate on and to take snapshots of the embeddings from; empty: those of train_data."""
    val_split: str = "val"
    """Split that snapshots of the embeddings are taken from; unused where there is none."""
    verify_data: bool = False
    """Compare the shards with their recorded checksums once, before the training."""
    workers: int = 1
    """Processes that decode; the order and the bytes of batches do not depend on their number."""
    tokenizer: str = "train"
    """`train` learns a WordPiece vocabulary from the captions; anything else is a path or a package that holds one."""
    tokenizer_vocab: int = 8192
    """Upper limit on the vocabulary that is learnt from the captions."""
    aug_scale: float = 0.6
    """Smallest share of an image's area that a random crop keeps; the largest is the whole image."""
    aug_flip: float = 0.0
    """Probability of a horizontal flip; 0 because captions speak of left and right."""
    aug_colour: float = 0.0
    """Greatest relative change of brightness, contrast and saturation; hues stay, because captions name colours."""
    aug_operations: int = 0
    """Operations of RandAugment on each crop; 0: none."""
    aug_magnitude: float = 5.0
    """Strength of those operations, from 0 to 10."""
    same_by: SameBy = "caption"
    """Pairs that same_caption speaks of: those with an equal caption, or those with the same image file, as where an
    image has five captions."""


@dataclass(frozen=True)
class Optimisation:
    """AdamW with linear warm-up and half a cosine."""

    steps: int = 1000
    batch_size: int = 4096
    """Pairs per step, over all ranks and micro-batches: the N of the contrast."""
    accum_freq: int = 1
    """Micro-batches per step; the contrast still sees the whole batch."""
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
    """Settings of the run itself. Only init_from, precision, seed and threads among them change the trained weights."""

    run_dir: str = "runs/oner"
    recipe: str = ""
    """The recipe that the settings began from; the recipe fills it in."""
    seed: int = 0
    device: str = "auto"
    precision: Precision = "auto"
    """auto: bfloat16 autocast where the processor multiplies in it, else float32."""
    threads: int | Literal["auto"] = "auto"
    """Threads of the CPU's ops: auto times one and more at the start; 0 leaves torch's choice."""
    resume: str = "latest"
    """latest, none, or the path of a checkpoint or of another run. Another run with the same settings is continued in
    run_dir. One that is done, or has other settings, begins a new phase: its weights and its optimiser's state are
    taken, and steps count from 0."""
    init_from: str = ""
    """A run or a file whose weights alone are taken: optimiser, schedule and data start anew. Positions are resampled
    to image_size."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    log_every_n_steps: int = 10
    snapshot_every: int = 0
    """Steps between snapshots of the embeddings of validation pairs; 0: none."""
    snapshot_pairs: int = 256
    eval_every: int = 0
    """Steps between evaluations on the validation split, by retrieval and zero-shot (metrics `eval/...`). RUN/best
    keeps the best model. 0: none."""
    eval_pairs: int = 0
    """Pairs of each of these evaluations, evenly spaced; 0: all."""
    deterministic: bool = True
    """Train under torch.use_deterministic_algorithms(True)."""
    max_skipped_steps: int = 20
    """Non-finite steps in a row that end the run."""
    collective_timeout: float = 1800.0
    """Seconds that a rank waits for the others before the run ends with an error that names them."""

    def __post_init__(self) -> None:
        if not self.run_dir.strip():
            raise ValueError("run_dir must name the folder of the run, got an empty name")
        if isinstance(self.threads, int) and self.threads < 0:
            raise ValueError(f"threads must be auto, 0 or more, got {self.threads}")
        for name in ("eval_every", "eval_pairs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not 0.0 < self.collective_timeout < math.inf:
            raise ValueError(f"collective_timeout must be positive and finite, got {self.collective_timeout}")
