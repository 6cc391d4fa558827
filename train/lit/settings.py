"""The configuration of heads on two packaged encoders, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field

from oner_fast.models.lit import LiTConfig
from oner_fast.train.config.common import Data, Optimisation, Run, check_temperature


@dataclass(frozen=True)
class HeadContrast:
    """The contrast of the heads."""

    temperature: float = 0.07
    """1 / logit_scale at the start; it is learnt, and logit_scale stays at 100 at most."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


@dataclass(frozen=True)
class LiTConfiguration:
    """The whole configuration of a run; saved beside it as config.json."""

    model: LiTConfig = field(default_factory=LiTConfig)
    contrast: HeadContrast = field(default_factory=HeadContrast)
    data: Data = field(default_factory=Data)
    optim: Optimisation = field(default_factory=Optimisation)
    run: Run = field(default_factory=Run)
