"""The configuration of OneR: every number that shapes a training, as frozen dataclasses."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

with suppress(ModuleNotFoundError):  # marks for the command line, which alone needs them
    from tyro.conf import Fixed, Suppress

from oner_fast.models.oner import OneRConfig
from oner_fast.train.config.common import Data, Optimisation, Run, SameCaption, check_temperature

CONTRASTS = ("itc", "xmc", "cic", "cmc")
"""The weights of the contrasts, which need embeddings."""


@dataclass(frozen=True)
class CustomObjective:
    """A user-defined objective in the configuration."""

    source: str
    """`FILE.py:FUNCTION`, or the name of an entry point of the group `oner_fast.objectives`."""
    weight: float
    """Its weight in the step's loss, above 0."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"the weight of objective {self.source!r} must be above 0, got {self.weight}")

    @property
    def name(self) -> str:
        """The function's name, which stands for the loss in the metrics."""
        return self.source.rpartition(":")[2]


@dataclass(frozen=True)
class Objectives:
    """Weights of the losses, and the form of the contrast.

    A weight of 0 omits the loss and the passes that only it needs.
    """

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
    same_caption: SameCaption = "negative"
    """Other pairs of the batch with the same caption: negatives, further positives, or left out of the contrast."""
    momentum_teacher: bool = True
    """Keys from the moving-average teacher; False: from the student itself, with gradient and without predictor
    (CLIP)."""
    momentum: float = 0.996
    """The teacher's momentum at the first step; it rises to 1 with half a cosine."""
    temperature_factor: bool = False
    """Multiply the contrasts by twice the temperature, as MoCo v3 does; the temperature must be fixed."""
    predictor: Literal["shared", "none", "per_head"] = "shared"
    """Predictor on the student's side: one for all passes, none, or one for each of two heads. Without a teacher there
    is none."""
    predictor_hidden: int = 4096
    teacher_view: Literal["same", "second"] = "same"
    """The teacher sees the student's crop, or a second one of the same image (MoCo v3 has two views)."""
    init_gap: float = 0.0
    """Modality gap at the start: push words and patches this many standard deviations of the initial positions apart,
    along one random direction. The gap that follows is measured and logged at step 0."""
    equal_heads: bool = False
    """Let two heads begin with the same weights, which makes the gap at the start narrower than two random heads do."""
    mask_patch_ratio: float = 0.5
    mask_word_ratio: float = 0.15
    force_patch_dropout: float = 0.0
    """Share of the patches left out of the student's passes, before they are embedded."""
    custom: Suppress[Fixed[tuple[CustomObjective, ...]]] = ()
    """User-defined objectives, which a recipe adds; no flag sets them."""

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
        if not 0.0 <= self.init_gap < math.inf:
            raise ValueError(f"init_gap must not be negative, got {self.init_gap}")
        if self.temperature_factor and self.learnable_temperature:
            raise ValueError("temperature_factor needs a fixed temperature: leave out --learnable-temperature")
        if self.teacher_view == "second" and not self.momentum_teacher:
            raise ValueError("teacher_view second needs a teacher: leave out --no-momentum-teacher")
        if self.custom and not self.contrastive:
            raise ValueError("a user-defined objective needs a contrast above 0: it reads the contrast's embeddings")
        names = [*CONTRASTS, "mlm", "mim", *(each.name for each in self.custom)]
        if taken := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"objectives need distinct names, got {', '.join(taken)} twice")

    @property
    def predicts(self) -> bool:
        """Whether the student has a predictor."""
        return self.contrastive and self.momentum_teacher and self.predictor != "none"

    @property
    def contrastive(self) -> bool:
        """Whether any of the four contrasts is on."""
        return any(getattr(self, name) for name in CONTRASTS)


@dataclass(frozen=True)
class OneRConfiguration:
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
        if objectives.equal_heads and self.model.shared_head:
            raise ValueError("equal_heads needs two heads: give --no-shared-head, or leave it out")
        if objectives.predictor == "per_head" and self.model.shared_head:
            raise ValueError("predictor per_head needs two heads: give --no-shared-head, or --predictor shared")
        cells = (self.model.image_size // self.model.patch_size) ** 2
        cells -= int(self.objectives.force_patch_dropout * cells)
        if self.objectives.mim and int(self.objectives.mask_patch_ratio * cells) == 0:
            ratio = self.objectives.mask_patch_ratio
            raise ValueError(f"mim is above 0 but mask_patch_ratio {ratio} of {cells} patches masks none")
        if not self.model.shared_trunk and any((self.objectives.xmc, self.objectives.cic, self.objectives.cmc)):
            raise ValueError("two trunks (shared_trunk=False) have no joint pass: set xmc, cic and cmc to 0")
