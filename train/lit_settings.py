"""What a training of heads on two packaged encoders can be told, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field

from oner_fast.models.lit import LiTConfig
from oner_fast.train.settings import MIN_TEMPERATURE, Data, Optimisation, Run


@dataclass(frozen=True)
class HeadContrast:
    """How the heads are contrasted."""

    temperature: float = 0.07
    """1 / logit_scale at the start; it is learnt, and logit_scale stays at 100 at most."""

    def __post_init__(self) -> None:
        if not self.temperature >= MIN_TEMPERATURE:
            raise ValueError(
                f"temperature must be at least {MIN_TEMPERATURE} (logit_scale 100), got {self.temperature}"
            )


@dataclass(frozen=True)
class LiTTraining:
    """The whole configuration of a run; saved beside it as config.json."""

    model: LiTConfig = field(default_factory=LiTConfig)
    contrast: HeadContrast = field(default_factory=HeadContrast)
    data: Data = field(default_factory=Data)
    optim: Optimisation = field(default_factory=Optimisation)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        if self.optim.batch_size % self.optim.accum_freq:
            raise ValueError(
                f"batch_size must be a multiple of accum_freq, got {self.optim.batch_size} and {self.optim.accum_freq}"
            )
