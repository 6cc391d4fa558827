"""The configuration of a two-tower CLIP, as frozen dataclasses. Flags carry open_clip's names."""

from __future__ import annotations

from dataclasses import dataclass, field

from oner_fast.models.clip import CLIPConfig
from oner_fast.train.config.common import Data, Optimisation, Run, SameCaption, check_temperature


@dataclass(frozen=True)
class Contrast:
    """The origin of the towers, and their contrast."""

    init_image: str = ""
    """A run of `oner-fast train uta`, whose student becomes the image tower (UTA's second stage); empty: a new ViT."""
    init_text: str = ""
    """The CLIP whose text tower is used, named as for --teacher of `train uta`; empty: a new text tower."""
    lock_image: bool = False
    """Keep the image tower's weights fixed."""
    lock_text: bool = False
    """Keep the text tower's weights fixed."""
    temperature: float = 0.07
    """1 / logit_scale at the start; it is learnt, and logit_scale stays at 100 at most. A given text tower has its own.
    """
    same_caption: SameCaption = "negative"
    """Other pairs of the batch with the same caption: negatives, further positives, or left out of the contrast."""

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if bool(self.init_image) != bool(self.init_text):
            raise ValueError("init_image and init_text go together: an aligned student and its teacher's text tower")
        if self.init_text and not self.lock_text:
            raise ValueError("a given text tower is not trained: add --lock-text")
        if (self.lock_image or self.lock_text) and not self.init_image:
            raise ValueError("lock_image and lock_text need towers to start from: --init-image and --init-text")


@dataclass(frozen=True)
class CLIPConfiguration:
    """The whole configuration of a run; saved beside it as config.json.

    `model` describes the new towers. Its `image_size` is the size of the images, also where no tower is new.
    """

    model: CLIPConfig = field(default_factory=CLIPConfig)
    contrast: Contrast = field(default_factory=Contrast)
    data: Data = field(default_factory=Data)
    optim: Optimisation = field(default_factory=Optimisation)
    run: Run = field(default_factory=Run)
