"""The gradient of a step of CLIP: the contrast of the whole batch, exact under micro-batches and ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from oner_fast import ops
from oner_fast.data.batch import PairBatch
from oner_fast.train.clip.towers import Embeddings, Texts, TwoTowers
from oner_fast.train.engine.distributed import World


class ContrastStep:
    """``step(batch)`` leaves the gradient of the whole batch in the towers and returns the loss (0-d, of all ranks).

    With ``accum_freq`` > 1 the contrast still sees all pairs: a first forward of every micro-batch without a graph
    gives the embeddings, the loss of all of them their gradients, and a second forward of each carries these back.
    """

    def __init__(self, towers: TwoTowers, accum_freq: int, world: World, autocast_dtype: torch.dtype | None) -> None:
        self.towers, self.accum_freq, self.world, self.autocast_dtype = towers, accum_freq, world, autocast_dtype
        self.module: nn.Module = towers
        self.group: dist.ProcessGroup | None = None
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.module = DistributedDataParallel(towers, device_ids=devices, gradient_as_bucket_view=True)
            self.group = dist.group.WORLD

    def __call__(self, batch: PairBatch) -> Tensor:
        inputs = [
            (
                part.images.to(self.world.device, non_blocking=True),
                self.towers.read(part.captions).to(self.world.device),
            )
            for part in batch.split(self.accum_freq)
        ]
        if len(inputs) == 1:
            loss = self._loss(self._forward(*inputs[0]))
            loss.backward()
            return loss.detach()
        with torch.no_grad(), self._without_sync():
            first = [self._forward(*each) for each in inputs]
        leaves = Embeddings(
            torch.cat([each.image for each in first]).requires_grad_(),
            torch.cat([each.text for each in first]).requires_grad_(),
            first[0].logit_scale.clone().requires_grad_(),
        )
        loss = self._loss(leaves)
        loss.backward()
        for index, each in enumerate(inputs):
            with nullcontext() if index == len(inputs) - 1 else self._without_sync():
                self._carry_back(self._forward(*each), leaves, index, len(inputs))
        return loss.detach()

    def _carry_back(self, output: Embeddings, leaves: Embeddings, index: int, count: int) -> None:
        surrogate = output.logit_scale * _gradient(leaves.logit_scale) / count
        for found, leaf in ((output.image, leaves.image), (output.text, leaves.text)):
            rows = found.shape[0]
            surrogate = surrogate + (found * _gradient(leaf)[index * rows : (index + 1) * rows]).sum()
        surrogate.backward()

    def _loss(self, output: Embeddings) -> Tensor:
        return ops.mixup_info_nce(output.image, output.text, output.logit_scale, group=self.group)

    def _forward(self, images: Tensor, texts: Texts) -> Embeddings:
        with torch.autocast(self.world.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext():
            output: Embeddings = self.module(images, texts)
        return Embeddings(output.image.float(), output.text.float(), output.logit_scale)

    def _without_sync(self) -> AbstractContextManager[object]:
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else nullcontext()


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad
