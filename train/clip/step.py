"""The gradient of a step of CLIP: the contrast of the whole batch, exact under micro-batches and ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from oner_fast import ops
from oner_fast.data.batch import PairBatch
from oner_fast.ops.collectives import ranks_alike
from oner_fast.train.clip.inputs import ContrastInput, ContrastInputs, Texts
from oner_fast.train.clip.towers import Embeddings, TwoTowers
from oner_fast.train.config.common import SameCaption
from oner_fast.train.engine.distributed import World
from oner_fast.train.engine.repeated_captions import ids_of_captions, repeated_share
from oner_fast.train.engine.replica import Replica
from oner_fast.train.engine.two_pass import Features, first_pass, second_pass


class ContrastStep:
    """`step(batch)` leaves the gradient of the whole batch in the towers and returns the loss (0-d, of all ranks).

    With `accum_freq` > 1 the contrast still sees all pairs, by two-pass accumulation
    (`oner_fast.train.engine.two_pass`).

    A batch brings its inputs from the loader's workers. Where it does not, they are made here by `prepare`.

    Attributes:
        lengths: the tokens of each caption of the last batch; empty where the captions were not packed.
        repeated_captions: the share of pairs, over all ranks, whose caption another pair of the last batch has, 0-d.
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
        self.prepare = ContrastInputs(accum_freq, towers.reader())
        self.lengths: tuple[int, ...] = ()
        self.repeated_captions = torch.zeros(())

    def __call__(self, batch: PairBatch) -> Tensor:
        if batch.inputs is None:
            batch = replace(batch, inputs=self.prepare(batch))
        moved = batch.to(self.world.device, non_blocking=True)
        given: ContrastInput = moved.inputs
        self.lengths = given.lengths
        texts = self._read(batch) if given.texts is None else given.texts
        inputs, ids = list(zip(given.images, texts, strict=True)), moved.caption_ids
        self.repeated_captions = repeated_share(ids)
        if len(inputs) == 1:
            loss = self._loss(self._forward(inputs[0]), ids)
            loss.backward()
            return loss.detach()
        leaves = first_pass(self.replica, self._forward, inputs)
        loss = self._loss(leaves, ids)
        loss.backward()
        second_pass(self.replica, self._forward, inputs, leaves)
        return loss.detach()

    def _read(self, batch: PairBatch) -> tuple[Texts, ...]:
        """Let the towers read the captions of each micro-batch; where they wait for the device, the step does."""
        size = len(batch) // self.accum_freq
        parts = [batch.captions[start : start + size] for start in range(0, len(batch), size)]
        return tuple(self.towers.read(part).to(self.world.device) for part in parts)

    def _loss(self, features: Features, ids: Tensor) -> Tensor:
        with ranks_alike():
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
