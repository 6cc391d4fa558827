"""The configuration of UTA, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from oner_fast.models.uta import UTAConfig
from oner_fast.ops.patch_masks import Pattern
from oner_fast.train.config.common import Data, Optimisation, Run

HeadInit = Literal["normal", "teacher_mean"]
Objective = Literal["uta", "distillation", "mask_token"]


@dataclass(frozen=True)
class Alignment:
    """The teacher, the tokens that are aligned to it, and the tokens that the student sees."""

    teacher: str = ""
    """The frozen CLIP: a run of `oner-fast train clip`, an open_clip name with its weights (ViT-B-16:openai), ...; or a
    run of `oner-fast train lit`, which is not a CLIP."""
    objective: Objective = "uta"
    """uta: [CLS] and the visible tokens; the hidden ones never enter the student. Comparison rows: distillation (every
    token enters and is aligned), mask_token (hidden tokens enter as [MASK]; they and [CLS] are aligned, as in EVA)."""
    mask_ratio: float = 0.5
    """Share of the patches that are hidden."""
    mask: Pattern = "reversed_block"
    head_init: HeadInit = "normal"
    """The head at the start (our choice). normal: truncated normal 0.02, no bias. teacher_mean: its bias is the mean
    direction of the teacher's tokens in the first batch, as long as the rest of an output."""
    drop_path: float = 0.0
    """Stochastic depth (our choice): the share of images that skip a residual branch of the last block; it grows
    linearly from 0 in the first."""
    teacher_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: the dtype that the student computes in."""
    teacher_cache: str = ""
    """Folder that keeps the teacher's tokens of every step, for runs of the same data with other students."""
    teacher_cache_dtype: Literal["bf16", "int8"] = "bf16"

    def __post_init__(self) -> None:
        if not 0.0 <= self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio must be in [0, 1), got {self.mask_ratio}")
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}")

    def hidden(self, cells: int) -> int:
        """Return how many of `cells` patches are hidden from the student."""
        return 0 if self.objective == "distillation" else int(self.mask_ratio * cells)


@dataclass(frozen=True)
class UTAConfiguration:
    """The whole configuration of a run; saved beside it as config.json."""

    model: UTAConfig = field(default_factory=UTAConfig)
    alignment: Alignment = field(default_factory=Alignment)
    data: Data = field(default_factory=Data)
    optim: Optimisation = field(default_factory=Optimisation)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        if self.model.mask_token != (self.alignment.objective == "mask_token"):
            raise ValueError(
                f"objective {self.alignment.objective!r} needs mask_token={not self.model.mask_token}: the token "
                "is learnt by mask_token alone"
            )
        if self.alignment.objective == "mask_token" and not self.alignment.hidden(self.model.cells):
            raise ValueError(
                f"mask_token with mask_ratio {self.alignment.mask_ratio} of {self.model.cells} patches hides none"
            )
