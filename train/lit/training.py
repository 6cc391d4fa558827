"""The training of the heads of a LiT-like teacher."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from oner_fast.data.batch import PairBatch
from oner_fast.models import pretrained_encoders
from oner_fast.models.lit import check_origins
from oner_fast.train.clip.training import TwoTowerTraining
from oner_fast.train.lit.settings import LiTConfiguration
from oner_fast.train.lit.towers import LiTTowers


class LiTTraining(TwoTowerTraining[LiTConfiguration]):
    """Contrast images with their captions: two linear heads and the temperature learn, the encoders stay fixed."""

    title = "lit"
    student: LiTTowers

    def _build(self) -> nn.Module:
        c = self.config
        return LiTTowers(c.model, pretrained_encoders.packaged_encoders(), c.contrast.temperature, self.world.device)

    def _flops(self, batch: PairBatch) -> float:
        """Count a forward of everything, and a backward that ends at the heads' weights."""
        encoders = self.student.encoders
        heads = 2 * (encoders.image_width + encoders.text_width) * self.config.model.embed_dim
        return (self._pair_flops + heads) * len(batch)

    def _load_extra_state(self, state: dict[str, Any]) -> None:
        check_origins(json.loads(state["encoders"]), self.student.encoders, str(self.folder))
