"""The gradient of a step of CLIP: the contrast of the whole batch, exact under micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from oner_fast import ops
from oner_fast.data.batch import PairBatch, TokenizedText
from oner_fast.train.clip.towers import Embeddings, Texts, TwoTowers
from oner_fast.train.config.common import SameCaption
from oner_fast.train.engine.distributed import World
from oner_fast.train.engine.repeated_captions import ids_of_captions
from oner_fast.train.engine.replica import Replica
from oner_fast.train.engine.two_pass import Features, first_pass, second_pass


class ContrastStep:
    """`step(batch)` leaves the gradient of the whole batch in the towers and returns the loss (0-d, of all ranks).

    With `accum_freq` > 1 the contrast still sees all pairs, by two-pass accumulation
    (`oner_fast.train.engine.two_pass`).

    Attributes:
        lengths: the tokens of each caption of the last batch; empty where the captions were not packed.
    """

    def __init__(
        self,
        towers: TwoTowers,
        accum_freq: int,
        world: World,
        autocast_dtype: torch.dtype | None,
        same_caption: SameCaption = "negative",
    ) -> None:
        self.towers, self.accum_freq, self.world, self.same_caption = towers, accum_freq, world, same_caption
        self.replica = Replica(towers, world, autocast_dtype)
        self.lengths: list[int] = []

    def __call__(self, batch: PairBatch) -> Tensor:
        parts = [(part.images, self.towers.read(part.captions)) for part in batch.split(self.accum_freq)]
        texts = [text for _, text in parts if isinstance(text, TokenizedText)]
        self.lengths = [length for text in texts for length in text.lengths.tolist()]
        device = self.world.device
        inputs = [(images.to(device, non_blocking=True), text.to(device)) for images, text in parts]
        ids = batch.caption_ids.to(device, non_blocking=True)
        if len(inputs) == 1:
            loss = self._loss(self._forward(inputs[0]), ids)
            loss.backward()
            return loss.detach()
        leaves = first_pass(self.replica, self._forward, inputs)
        loss = self._loss(leaves, ids)
        loss.backward()
        second_pass(self.replica, self._forward, inputs, leaves)
        return loss.detach()

    def _loss(self, features: Features, ids: Tensor) -> Tensor:
        return ops.mixup_info_nce(
            features.embeddings["image"],
            features.embeddings["text"],
            features.logit_scale,
            **ids_of_captions(ids, self.same_caption),
            group=self.replica.group,
        )

    def _forward(self, inputs: tuple[Tensor, Texts]) -> Features:
        output: Embeddings = self.replica(*inputs)
        return Features({"image": output.image.float(), "text": output.text.float()}, output.logit_scale)
